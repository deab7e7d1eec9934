// mbarriers, and the tensor memory accelerator's copies of boxes.
#pragma once

#include "memory.h"

namespace ptx {

// mbarriers: an address and an offset, then what else there is.
inline uint32_t mbarrier_address(Warp& w, const int32_t* o, int lane) { return w.reg<uint32_t>(o[0])[lane] + o[1]; }
inline Mbarrier& mbarrier_at(Warp& w, int lane, uint32_t address) {
  const auto found = w.block.mbarriers.find(address);
  if (found == w.block.mbarriers.end()) {
    throw Trap(w.name(lane) + ": there is no mbarrier at shared byte " + number(address - int64_t{kSharedBase}));
  }
  const Epoch& maker = w.block.units("an mbarrier", address, 8, 8)->writer;
  if (!w.knows(maker, lane))
    throw Trap("race: " + w.name(lane) + " uses an mbarrier with no barrier since it was made");
  return found->second;
}
inline void note_use(Warp& w, int lane, uint32_t address) {
  Unit* unit = w.block.units("an mbarrier", address, 8, 8);
  for (uint32_t i = 0; i < 8; i += w.block.program.unit, ++unit) unit->barrier = false;
  w.block.note_read(w, lane, address, 8);
  unit -= 8 / w.block.program.unit;
  for (uint32_t i = 0; i < 8; i += w.block.program.unit, ++unit) unit->barrier = true;
}
inline Then mbarrier_init(Warp& w, const int32_t* o, Lanes lanes) {
  for_lanes(lanes, [&](int i) {
    const uint32_t address = mbarrier_address(w, o, i);
    const int count = w.reg<uint32_t>(o[2])[i];
    w.block.note_write(w, i, address, 8);
    w.block.mbarriers[address] = Mbarrier{w.block.program.warps + w.block.mbarriers_made++, count, count};
    Unit* unit = w.block.units("an mbarrier", address, 8, 8);
    for (uint32_t b = 0; b < 8; b += w.block.program.unit, ++unit) unit->barrier = true;
  });
  return Then::next;
}
inline Then mbarrier_inval(Warp& w, const int32_t* o, Lanes lanes) {
  for_lanes(lanes, [&](int i) {
    const uint32_t address = mbarrier_address(w, o, i);
    const Mbarrier& barrier = mbarrier_at(w, i, address);
    if (barrier.bytes || !barrier.waiting.empty()) throw Trap(w.name(i) + " invalidates an mbarrier in use");
    w.block.mbarriers.erase(address);
    Unit* unit = w.block.units("an mbarrier", address, 8, 8);
    for (uint32_t b = 0; b < 8; b += w.block.program.unit, ++unit) unit->barrier = false;
    w.block.note_write(w, i, address, 8);
    unit -= 8 / w.block.program.unit;
    for (uint32_t b = 0; b < 8; b += w.block.program.unit, ++unit) unit->written = false;
  });
  return Then::next;
}
inline void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.to_come < 0) throw Trap("more arrivals at an mbarrier than its " + number(barrier.count));
  if (barrier.to_come || barrier.bytes) return;
  ++barrier.phase;
  barrier.to_come = barrier.count;
  barrier.arrived.raise(barrier.agent, barrier.phase);
  barrier.ended = barrier.arrived;
  barrier.ended_fenced = barrier.arrived_fenced;
  for (const auto& [waiter, parity] : barrier.waiting) waiter->state = State::ready;  // and asks again
  barrier.waiting.clear();
}
inline Then mbarrier_expect(Warp& w, const int32_t* o, Lanes lanes) {
  for_lanes(lanes, [&](int i) {
    const uint32_t address = mbarrier_address(w, o, i);
    Mbarrier& barrier = mbarrier_at(w, i, address);
    note_use(w, i, address);
    barrier.bytes += w.reg<uint32_t>(o[2])[i];
    --barrier.to_come;
    ++w.time;
    barrier.arrived.join(w.knows_of);
    barrier.arrived.raise(w.number, lanes == w.live ? w.time : w.synced);
    barrier.arrived_fenced.join(w.fenced);
    end_phase_if_complete(barrier);
  });
  return Then::next;
}
// p, address, offset, parity. It may say no though the phase is over, and here sometimes does.
inline Then mbarrier_try_wait(Warp& w, const int32_t* o, Lanes lanes) {
  Lanes& to = *w.reg<Lanes>(o[0]);
  const int first = __builtin_ctz(lanes);
  const uint32_t address = mbarrier_address(w, o + 1, first), parity = w.reg<uint32_t>(o[3])[first];
  for_lanes(lanes, [&](int i) {
    if (mbarrier_address(w, o + 1, i) != address || w.reg<uint32_t>(o[3])[i] != parity) {
      throw Trap("divergence: the lanes of " + w.name(i) + " wait for different mbarriers");
    }
    mbarrier_at(w, i, address);
    note_use(w, i, address);
  });
  if (parity > 1) throw Trap(w.name(first) + " waits for parity " + number(parity));
  Mbarrier& barrier = mbarrier_at(w, first, address);
  if (w.block.random() % 2) {
    to &= ~lanes;
    return Then::yield;
  }
  if (barrier.phase % 2 != parity) {
    to |= lanes;
    w.knows_of.join(barrier.ended);
    w.fenced.join(barrier.ended_fenced);
    return Then::next;
  }
  if (w.groups.size() > 1) {  // others of the warp can go on
    to &= ~lanes;
    return Then::yield;
  }
  barrier.waiting.emplace_back(&w, parity);
  w.state = State::waiting;
  w.waits_for = "for parity " + number(parity) + " of the mbarrier at shared byte " + number(address - kSharedBase) +
                ", in phase " + number(barrier.phase) + " with " + number(barrier.to_come) + " arrivals and " +
                number(barrier.bytes) + " bytes to come";
  return Then::retry;
}

// TMA. f(shared, global or 0, bytes within the matrix) for every 16 bytes of a box.
template <typename F>
void for_box(const TensorMap& m, int64_t row, int64_t column, uint32_t shared, F f) {
  const int chunk = 16 / m.element;
  for (int r = 0; r < m.box_rows; ++r) {
    for (int c = 0; c < m.box_columns; c += chunk) {
      const uint32_t to = emulation::permuted(shared + m.element * (r * m.box_columns + c), m.swizzle);
      const bool inside = row + r >= 0 && row + r < m.rows && column + c >= 0 && column + c < m.columns;
      const int64_t bytes = inside ? m.element * std::min<int64_t>(chunk, m.columns - column - c) : 0;
      f(to, inside ? m.data + (row + r) * m.stride + m.element * (column + c) : 0, bytes);
    }
  }
}
inline TensorMap tensor_map(Warp& w, int lane, uint64_t address, uint32_t shared, int32_t column) {
  const uint64_t begin = reinterpret_cast<uint64_t>(w.block.parameters);
  if (address < begin || address + 128 > begin + w.block.parameter_bytes || address % 64) {
    throw Trap(w.name(lane) + ": there is no tensor map where it says");
  }
  TensorMap map;
  std::memcpy(&map, reinterpret_cast<const void*>(address), sizeof(map));
  const auto check = [&](bool good, const char* what) {
    if (!good) throw Trap(w.name(lane) + ": tensor map: " + what);
  };
  check(map.magic == kTensorMap, "it is none");
  check(map.data % 16 == 0 && map.stride % 16 == 0, "rows are not aligned to 16 bytes");
  check(map.rows >= 1 && map.columns >= 1, "the matrix is empty");
  check(map.box_rows >= 1 && map.box_rows <= 256 && map.box_columns <= 256, "a box has 1 to 256 rows and columns");
  check(map.box_columns * map.element % 16 == 0, "the rows of a box are not whole chunks of 16 bytes");
  check(!map.swizzle || map.box_columns * map.element <= 16 << map.swizzle, "the rows of a box exceed the swizzle");
  check(shared % 128 == 0, "a box in shared memory is not aligned to 128 bytes");
  check(column * map.element % 16 == 0, "a box that does not begin at a chunk of 16 bytes is not emulated");
  w.block.units("a box", shared, map.box_rows * map.box_columns * map.element, 128);
  return map;
}
// [shared], [map, {column, row}], [mbarrier].
inline Then tile_load(Warp& w, const int32_t* o, Lanes lanes) {
  Block& block = w.block;
  for_lanes(lanes, [&](int i) {
    const uint32_t shared = w.reg<uint32_t>(o[0])[i] + o[1], address = mbarrier_address(w, o + 6, i);
    const int32_t column = w.reg<int32_t>(o[4])[i], row = w.reg<int32_t>(o[5])[i];
    const TensorMap map = tensor_map(w, i, w.reg<uint64_t>(o[2])[i] + o[3], shared, column);
    const int agent = mbarrier_at(w, i, address).agent;
    note_use(w, i, address);
    for_box(map, row, column, shared, [&](uint32_t to, uint64_t from, size_t bytes) {
      if (from) block.check_global(w, i, from, bytes, map.element, false);
      block.note_write(w, i, to, 16, true);
      Unit* unit = block.units("a box", to, 16, 16);
      for (int b = 0; b < 16; b += block.program.unit, ++unit) {
        unit->by_copy = true;
        unit->writer = {static_cast<int16_t>(agent), kAllOf, UINT32_MAX};  // nobody knows of it yet
      }
      std::memset(block.at(to), 0xff, 16);  // NaN in bf16, fp16 and e4m3
    });
    const int32_t line = block.running;
    block.under_way.push_back([&block, address, agent, map, row, column, shared, line] {
      const auto found = block.mbarriers.find(address);
      block.running = line;
      if (found == block.mbarriers.end() || found->second.agent != agent) throw Trap("a copy's mbarrier is gone");
      Mbarrier& barrier = found->second;
      int total = 0;
      for_box(map, row, column, shared, [&](uint32_t to, uint64_t from, size_t bytes) {
        std::memset(block.at(to), 0, 16);
        if (from) std::memcpy(block.at(to), reinterpret_cast<const void*>(from), bytes);
        Unit* unit = block.units("a box", to, 16, 16);
        for (int b = 0; b < 16; b += block.program.unit, ++unit) {
          unit->under_way = false;
          unit->writer.time = barrier.phase;  // whoever waits for the end of this phase
        }
        total += 16;
      });
      block.counts.copied_in += total;
      barrier.bytes -= total;
      end_phase_if_complete(barrier);
    });
  });
  return Then::next;
}
// [map, {column, row}], [shared].
inline Then tile_store(Warp& w, const int32_t* o, Lanes lanes) {
  for_lanes(lanes, [&](int i) {
    const uint32_t shared = w.reg<uint32_t>(o[4])[i] + o[5];
    const int32_t column = w.reg<int32_t>(o[2])[i], row = w.reg<int32_t>(o[3])[i];
    const TensorMap map = tensor_map(w, i, w.reg<uint64_t>(o[0])[i] + o[1], shared, column);
    for_box(map, row, column, shared, [&](uint32_t from, uint64_t to, size_t bytes) {
      w.block.note_async_read(w, i, from, 16);
      if (to) w.block.check_global(w, i, to, bytes, map.element, true);
      w.block.counts.copied_out += bytes;
    });
    w.stores[i].push_back({map, row, column, shared});
  });
  return Then::next;
}
inline Then store_commit(Warp& w, const int32_t*, Lanes lanes) {
  for_lanes(lanes, [&](int i) {
    w.store_groups[i].push_back(std::move(w.stores[i]));
    w.stores[i].clear();
  });
  return Then::next;
}
inline Then store_wait(Warp& w, const int32_t* o, Lanes lanes) {
  const size_t pending = *w.reg<uint32_t>(o[0]);
  for_lanes(lanes, [&](int i) {
    auto& groups = w.store_groups[i];
    const size_t over = groups.size() > pending ? groups.size() - pending : 0;
    for (size_t g = 0; g < over; ++g) {
      for (const StoreAsync& store : groups[g]) {
        for_box(store.map, store.row, store.column, store.shared, [&](uint32_t from, uint64_t to, size_t bytes) {
          if (to) {
            w.block.note_global_write(w, i, to, bytes, w.block.at(from));
            std::memcpy(reinterpret_cast<void*>(to), w.block.at(from), bytes);
          }
          w.block.end_async_read(w, i, from, 16);
        });
      }
    }
    groups.erase(groups.begin(), groups.begin() + over);
  });
  return Then::next;
}

inline void add_tma(std::vector<Op>& all) {
  all.push_back({"mbarrier.init.shared.b64", mbarrier_init});
  all.push_back({"mbarrier.inval.shared.b64", mbarrier_inval});
  all.push_back({"mbarrier.arrive.expect_tx.shared.b64", mbarrier_expect});
  all.push_back({"mbarrier.try_wait.parity.shared.b64", mbarrier_try_wait});
  all.push_back({"cp.async.bulk.tensor.2d.shared.global.mbarrier::complete_tx::bytes", tile_load});
  all.push_back({"cp.async.bulk.tensor.2d.global.shared.bulk_group", tile_store});
  all.push_back({"cp.async.bulk.commit_group", store_commit});
  all.push_back({"cp.async.bulk.wait_group.read", store_wait});
  all.push_back({"cp.async.bulk.wait_group", store_wait});
}

}  // namespace ptx
