// Loads and stores, barriers, shuffles, matrices of a warp, and cp.async.
#pragma once

#include "arithmetic.h"

namespace ptx {

// The operands of a memory access: values, then address and offset.
template <typename T, int N>
Then load_global(Warp& w, const int32_t* o, Lanes lanes) {
  const uint64_t* address = w.reg<uint64_t>(o[N]);
  uint8_t* to[N];
  int shift[N];
  for (int n = 0; n < N; ++n) to[n] = w.bytes(o[n], shift[n]);
  for_lanes(lanes, [&](int i) {
    const uint64_t from = address[i] + o[N + 1];
    w.block.check_global(w, i, from, sizeof(T) * N, sizeof(T) * N, false);
    w.block.note_global_read(w, i, from, sizeof(T) * N);
    for (int n = 0; n < N; ++n) {
      T x;
      std::memcpy(&x, reinterpret_cast<const T*>(from) + n, sizeof(T));
      const int64_t wide = x;
      std::memcpy(to[n] + (i << shift[n]), &wide, size_t{1} << shift[n]);
    }
  });
  w.block.counts.global_read += __builtin_popcount(lanes) * sizeof(T) * N;
  return Then::next;
}
template <typename T, int N>
Then store_global(Warp& w, const int32_t* o, Lanes lanes) {
  const uint64_t* address = w.reg<uint64_t>(o[0]);
  for_lanes(lanes, [&](int i) {
    const uint64_t to = address[i] + o[1];
    w.block.check_global(w, i, to, sizeof(T) * N, sizeof(T) * N, true);
    T what[N];
    for (int n = 0; n < N; ++n) {
      int shift;
      const uint8_t* from = w.bytes(o[2 + n], shift);
      std::memcpy(&what[n], from + (i << shift), sizeof(T));
    }
    w.block.note_global_write(w, i, to, sizeof(what), what);
    std::memcpy(reinterpret_cast<void*>(to), what, sizeof(what));
  });
  w.block.counts.global_written += __builtin_popcount(lanes) * sizeof(T) * N;
  return Then::next;
}
template <typename T, int N>
Then load_shared(Warp& w, const int32_t* o, Lanes lanes) {
  const uint32_t* address = w.reg<uint32_t>(o[N]);
  uint32_t from[kLanes];
  for_lanes(lanes, [&](int i) { from[i] = address[i] + o[N + 1]; });
  for_lanes(lanes, [&](int i) {
    w.block.note_read(w, i, from[i], sizeof(T) * N);
    for (int n = 0; n < N; ++n) {
      T x;
      std::memcpy(&x, w.block.at(from[i] + sizeof(T) * n), sizeof(T));
      const int64_t wide = x;
      int shift;
      uint8_t* to = w.bytes(o[n], shift);
      std::memcpy(to + (i << shift), &wide, size_t{1} << shift);
    }
  });
  w.block.count_turns(w, from, lanes, sizeof(T) * N);
  w.block.counts.shared_read += __builtin_popcount(lanes) * sizeof(T) * N;
  return Then::next;
}
template <typename T, int N>
Then store_shared(Warp& w, const int32_t* o, Lanes lanes) {
  const uint32_t* address = w.reg<uint32_t>(o[0]);
  uint32_t to[kLanes];
  for_lanes(lanes, [&](int i) { to[i] = address[i] + o[1]; });
  const int last = w.block.random() % kLanes;  // where several write to one place, one of them wins
  for_lanes(kAll, [&](int lane) {
    const int i = lane ^ last;
    if (!(lanes >> i & 1)) return;
    T what[N];
    for (int n = 0; n < N; ++n) {
      int shift;
      const uint8_t* from = w.bytes(o[2 + n], shift);
      std::memcpy(&what[n], from + (i << shift), sizeof(T));
    }
    w.block.note_write(w, i, to[i], sizeof(what), false, what);
    std::memcpy(w.block.at(to[i]), what, sizeof(what));
  });
  w.block.count_turns(w, to, lanes, sizeof(T) * N);
  w.block.counts.shared_written += __builtin_popcount(lanes) * sizeof(T) * N;
  return Then::next;
}
template <typename T>
Then load_parameter(Warp& w, const int32_t* o, Lanes lanes) {
  const uint64_t at = *w.reg<uint64_t>(o[1]) + o[2];
  if (at + sizeof(T) > w.block.parameter_bytes) throw Trap("there is no parameter at byte " + number(at));
  T x;
  std::memcpy(&x, w.block.parameters + at, sizeof(T));
  const int64_t wide = x;
  int shift;
  uint8_t* to = w.bytes(o[0], shift);
  for_lanes(lanes, [&](int i) { std::memcpy(to + (i << shift), &wide, size_t{1} << shift); });
  return Then::next;
}

// Rows of 8 x 8 matrices of 16-bit elements: lanes 8 m to 8 m + 7 say where those of matrix m are. Lane i has elements
// 2 (i % 4) and the next of row i / 4; transposed, of column i / 4.
template <int N, bool transposed, bool store>
Then matrices(Warp& w, const int32_t* o, Lanes) {
  const int first = store ? 2 : 0;
  const uint32_t* address = w.reg<uint32_t>(store ? o[0] : o[N]);
  const int32_t offset = store ? o[1] : o[N + 1];
  for (int m = 0; m < N; ++m) {
    uint16_t matrix[8][8];
    uint32_t* lane = w.reg<uint32_t>(o[first + m]);
    uint32_t rows[kLanes] = {};
    const auto element = [&](int i, int e) -> uint16_t& {
      const int row = i / 4, column = 2 * (i % 4) + e;
      return transposed ? matrix[column][row] : matrix[row][column];
    };
    if (store) {
      for (int i = 0; i < kLanes; ++i) element(i, 0) = lane[i], element(i, 1) = lane[i] >> 16;
    }
    for (int row = 0; row < 8; ++row) {
      const uint32_t at = rows[8 * m + row] = address[8 * m + row] + offset;
      if (store) {
        w.block.note_write(w, 8 * m + row, at, 16);
        std::memcpy(w.block.at(at), matrix[row], 16);
      } else {
        w.block.note_read(w, 8 * m + row, at, 16);
        std::memcpy(matrix[row], w.block.at(at), 16);
      }
    }
    w.block.count_turns(w, rows, 0xffu << 8 * m, 16);
    (store ? w.block.counts.shared_written : w.block.counts.shared_read) += sizeof(matrix);
    if (!store) {
      for (int i = 0; i < kLanes; ++i) lane[i] = pair(element(i, 1), element(i, 0));
    }
  }
  return Then::next;
}

// d | p, a, b, c, members.
enum class Shuffle { xor_, index, up, down };
template <Shuffle how>
Then shuffle(Warp& w, const int32_t* o, Lanes) {
  uint32_t* to = w.reg<uint32_t>(o[0]);
  const uint32_t *a = w.reg<uint32_t>(o[1]), *b = w.reg<uint32_t>(o[2]), *c = w.reg<uint32_t>(o[3]);
  uint32_t in[kLanes];
  std::copy_n(a, kLanes, in);
  for (int i = 0; i < kLanes; ++i) {
    const int segments = c[i] >> 8 & 31, clamp = c[i] & 31, by = b[i] & 31;
    const int most = (i & segments) | (clamp & ~segments), least = i & segments;
    int from = how == Shuffle::xor_    ? i ^ by
               : how == Shuffle::index ? least | (by & ~segments)
               : how == Shuffle::up    ? i - by
                                       : i + by;
    const bool inside = how == Shuffle::up ? from >= most : from <= most;
    to[i] = in[inside ? from : i];
  }
  return Then::next;
}

inline Then barrier(Warp& w, const int32_t* o, Lanes) {
  const int id = *w.reg<uint32_t>(o[0]);
  std::vector<Warp*>& here = w.block.barriers[id];
  here.push_back(&w);
  if (static_cast<int>(here.size()) < w.block.program.warps) {
    w.state = State::waiting;
    w.waits_for = "at barrier " + number(id);
    return Then::next;
  }
  Clock knows, fenced;
  for (Warp* other : here) {
    other->sync();
    knows.join(other->knows_of);
    knows.raise(other->number, other->time);
    fenced.join(other->fenced);
  }
  for (Warp* other : here) {
    other->knows_of = knows;
    other->fenced = fenced;
    other->state = State::ready;
  }
  here.clear();
  return Then::yield;
}

inline Then proxy_fence(Warp& w, const int32_t*, Lanes lanes) {
  ++w.time;
  w.fenced.join(w.knows_of);
  // Of its own warp a lane that fences alone knows what it did before they last met.
  w.fenced.raise(w.number, lanes == w.live ? w.time : w.synced);
  return Then::next;
}

// cp.async, as late as the rules allow: the bytes are read now, and come when they are waited for.
template <int N>
Then copy_async(Warp& w, const int32_t* o, Lanes lanes) {
  const uint32_t* to = w.reg<uint32_t>(o[0]);
  const uint64_t* from = w.reg<uint64_t>(o[2]);
  const uint32_t* size = w.reg<uint32_t>(o[5]);
  for_lanes(lanes, [&](int i) {
    if (size[i] > N) throw Trap(w.name(i) + " copies " + number(size[i]) + " of " + number(N) + " bytes");
    CopyAsync copy{to[i] + o[1], {}, N};
    const uint64_t at = from[i] + o[3];
    if (size[i]) {
      w.block.check_global(w, i, at, size[i], N, false);
      w.block.note_global_read(w, i, at, size[i]);
      std::memcpy(copy.bytes, reinterpret_cast<const void*>(at), size[i]);
    }
    w.block.note_write(w, i, copy.shared, N, true);
    w.copies[i].push_back(copy);
    w.block.counts.async_copied += size[i];
  });
  return Then::next;
}
inline Then copy_commit(Warp& w, const int32_t*, Lanes lanes) {
  for_lanes(lanes, [&](int i) {
    w.copy_groups[i].push_back(std::move(w.copies[i]));
    w.copies[i].clear();
  });
  return Then::next;
}
inline Then copy_wait(Warp& w, const int32_t* o, Lanes lanes) {
  const size_t pending = *w.reg<uint32_t>(o[0]);
  for_lanes(lanes, [&](int i) {
    auto& groups = w.copy_groups[i];
    const size_t over = groups.size() > pending ? groups.size() - pending : 0;
    for (size_t g = 0; g < over; ++g) {
      for (const CopyAsync& copy : groups[g]) {
        w.block.note_write(w, i, copy.shared, copy.count);
        std::memcpy(w.block.at(copy.shared), copy.bytes, copy.count);
      }
    }
    groups.erase(groups.begin(), groups.begin() + over);
  });
  return Then::next;
}

inline void add_memory(std::vector<Op>& all) {
#define MEMORY(space, function)                                          \
  all.push_back({"ld." space ".b8", load_##function<uint8_t, 1>});       \
  all.push_back({"ld." space ".u8", load_##function<uint8_t, 1>});       \
  all.push_back({"ld." space ".s8", load_##function<int8_t, 1>});        \
  all.push_back({"ld." space ".b16", load_##function<uint16_t, 1>});     \
  all.push_back({"ld." space ".b32", load_##function<uint32_t, 1>});     \
  all.push_back({"ld." space ".b64", load_##function<uint64_t, 1>});     \
  all.push_back({"ld." space ".v2.b8", load_##function<uint8_t, 2>});    \
  all.push_back({"ld." space ".v4.b8", load_##function<uint8_t, 4>});    \
  all.push_back({"ld." space ".v2.b16", load_##function<uint16_t, 2>});  \
  all.push_back({"ld." space ".v4.b16", load_##function<uint16_t, 4>});  \
  all.push_back({"ld." space ".v2.b32", load_##function<uint32_t, 2>});  \
  all.push_back({"ld." space ".v4.b32", load_##function<uint32_t, 4>});  \
  all.push_back({"ld." space ".v2.b64", load_##function<uint64_t, 2>});  \
  all.push_back({"st." space ".b8", store_##function<uint8_t, 1>});      \
  all.push_back({"st." space ".b16", store_##function<uint16_t, 1>});    \
  all.push_back({"st." space ".b32", store_##function<uint32_t, 1>});    \
  all.push_back({"st." space ".b64", store_##function<uint64_t, 1>});    \
  all.push_back({"st." space ".v2.b8", store_##function<uint8_t, 2>});   \
  all.push_back({"st." space ".v4.b8", store_##function<uint8_t, 4>});   \
  all.push_back({"st." space ".v2.b16", store_##function<uint16_t, 2>}); \
  all.push_back({"st." space ".v4.b16", store_##function<uint16_t, 4>}); \
  all.push_back({"st." space ".v2.b32", store_##function<uint32_t, 2>}); \
  all.push_back({"st." space ".v4.b32", store_##function<uint32_t, 4>}); \
  all.push_back({"st." space ".v2.b64", store_##function<uint64_t, 2>})
  MEMORY("global", global);
  MEMORY("shared", shared);
  for (const char* name : {"ld.param.b32", "ld.param.u32", "ld.param.f32"}) {
    all.push_back({name, load_parameter<uint32_t>});
  }
  all.push_back({"ld.param.s32", load_parameter<int32_t>});
  for (const char* name : {"ld.param.b64", "ld.param.u64"}) all.push_back({name, load_parameter<uint64_t>});
  for (const char* name : {"ld.param.b16", "ld.param.u16"}) all.push_back({name, load_parameter<uint16_t>});
  for (const char* name : {"ld.param.b8", "ld.param.u8"}) all.push_back({name, load_parameter<uint8_t>});
  all.push_back({"cvta.param.u64", [](Warp& w, const int32_t* o, Lanes lanes) {
                   uint64_t* to = w.reg<uint64_t>(o[0]);
                   const uint64_t* at = w.reg<uint64_t>(o[1]);
                   for_lanes(lanes, [&](int i) { to[i] = reinterpret_cast<uint64_t>(w.block.parameters) + at[i]; });
                   return Then::next;
                 }});
#define MATRICES(shape, n)                                                                                            \
  all.push_back({"ldmatrix.sync.aligned.m8n8." shape ".shared.b16", matrices<n, false, false>, Op::whole_warp});      \
  all.push_back({"ldmatrix.sync.aligned.m8n8." shape ".trans.shared.b16", matrices<n, true, false>, Op::whole_warp}); \
  all.push_back({"stmatrix.sync.aligned.m8n8." shape ".shared.b16", matrices<n, false, true>, Op::whole_warp});       \
  all.push_back({"stmatrix.sync.aligned.m8n8." shape ".trans.shared.b16", matrices<n, true, true>, Op::whole_warp})
  MATRICES("x1", 1);
  MATRICES("x2", 2);
  MATRICES("x4", 4);
  all.push_back({"shfl.sync.bfly.b32", shuffle<Shuffle::xor_>, Op::whole_warp});
  all.push_back({"shfl.sync.idx.b32", shuffle<Shuffle::index>, Op::whole_warp});
  all.push_back({"shfl.sync.up.b32", shuffle<Shuffle::up>, Op::whole_warp});
  all.push_back({"shfl.sync.down.b32", shuffle<Shuffle::down>, Op::whole_warp});
  all.push_back({"elect.sync",
                 [](Warp& w, const int32_t* o, Lanes lanes) {  // d | p, members: always the same lane
                   uint32_t* to = w.reg<uint32_t>(o[0]);
                   for_lanes(lanes, [&](int i) { to[i] = w.block.leader; });
                   *w.reg<Lanes>(o[1]) = Lanes{1} << w.block.leader;
                   return Then::next;
                 },
                 Op::whole_warp});
  all.push_back({"bar.sync", barrier, Op::whole_warp});
  all.push_back({"barrier.sync", barrier, Op::whole_warp});
  all.push_back({"bar.warp.sync", [](Warp& w, const int32_t*, Lanes) { return w.sync(), Then::next; }, Op::whole_warp});
  all.push_back({"fence.proxy.async.shared", proxy_fence});
  all.push_back({"fence.proxy.async", proxy_fence});
  all.push_back({"cp.async.ca.shared.global.4", copy_async<4>});
  all.push_back({"cp.async.ca.shared.global.8", copy_async<8>});
  all.push_back({"cp.async.ca.shared.global.16", copy_async<16>});
  all.push_back({"cp.async.cg.shared.global.16", copy_async<16>});
  all.push_back({"cp.async.commit_group", copy_commit});
  all.push_back({"cp.async.wait_group", copy_wait});
  all.push_back({"bra", nullptr, Op::branch});
  all.push_back({"ret", nullptr, Op::exit});
  all.push_back({"exit", nullptr, Op::exit});
}

}  // namespace ptx
