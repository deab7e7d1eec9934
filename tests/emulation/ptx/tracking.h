// Who touched what: shared memory by its units, global memory that the launch has written. See machine.h.
#pragma once

#include "machine.h"

namespace ptx {

inline Unit* Block::units(const std::string& who, uint32_t address, uint32_t bytes, uint32_t aligned) {
  if (address % aligned) throw Trap(who + ": shared address " + number(address) + " is not aligned");
  if (address < kSharedBase || address + bytes > kSharedBase + shared.size()) {
    throw Trap(who + ": shared address " + number(address - int64_t{kSharedBase}) + " is beyond the " +
               number(shared.size()) + " bytes there are");
  }
  return &units_[(address - kSharedBase) / program.unit];
}

inline void Block::note_write(Warp& warp, int lane, uint32_t address, uint32_t bytes, bool is_under_way,
                              const void* what) {
  Unit* unit = units("a write", address, bytes, std::min(bytes, 16u));
  Reader* reader = &readers_[(unit - units_.data()) * program.warps];
  for (uint32_t i = 0; i < bytes; i += program.unit, ++unit) {
    const auto trap = [&](const std::string& why) {
      throw Trap("race: " + warp.name(lane) + " writes shared byte " + number(address + i - kSharedBase) + ", which " +
                 why);
    };
    if (unit->barrier) trap("holds an mbarrier");
    if (unit->in_use) trap("a product or store under way still reads");
    if (unit->under_way && unit->writer.agent >= program.warps) trap("a copy under way writes");
    // Lanes of one instruction may write to one place: one of them wins. Triton lets them where all hold the same sum,
    // and warps where all hold the same bits.
    const bool again = what && !unit->under_way && !unit->by_copy &&
                       !std::memcmp(at(address + i), static_cast<const char*>(what) + i, program.unit);
    if (unit->written_by != instructions && !again && !warp.knows(unit->writer, lane)) {
      trap(name(unit->writer) + " wrote with no barrier between");
    }
    unit->written_by = instructions;
    for (int w = 0; w < program.warps; ++w, ++reader) {
      if (!reader->time) continue;
      const Epoch read{static_cast<int16_t>(w), reader->lane, reader->time};
      if (!warp.knows(read, lane)) trap(name(read) + " read with no barrier between");
      reader->time = 0;
    }
    unit->written = true;
    unit->under_way = is_under_way;
    unit->by_copy = false;
    unit->writer = warp.now(lane);
  }
}

inline void Block::note_read(Warp& warp, int lane, uint32_t address, uint32_t bytes) {
  Unit* unit = units("a read", address, bytes, std::min(bytes, 16u));
  Reader* reader = &readers_[(unit - units_.data()) * program.warps + warp.number];
  for (uint32_t i = 0; i < bytes; i += program.unit, ++unit, reader += program.warps) {
    const auto trap = [&](const std::string& why) {
      throw Trap(warp.name(lane) + " reads shared byte " + number(address + i - kSharedBase) + ", " + why);
    };
    if (unit->barrier) trap("which holds an mbarrier");
    if (!unit->written) trap("which nobody has written");
    if (unit->under_way) trap("whose copy nobody has waited for");
    if (!warp.knows(unit->writer, lane)) trap("race: which " + name(unit->writer) + " wrote with no barrier between");
    reader->lane = reader->time == warp.time && reader->lane != lane ? kAllOf : lane;
    reader->time = warp.time;
  }
}

// TMA and wgmma read shared memory on behalf of a lane, or of the whole warp.
inline void Block::note_async_read(Warp& warp, int lane, uint32_t address, uint32_t bytes) {
  Unit* unit = units("a product or store", address, bytes, 16);
  for (uint32_t i = 0; i < bytes; i += program.unit, ++unit) {
    const auto trap = [&](const std::string& why) {
      throw Trap(warp.name(lane) + " has shared byte " + number(address + i - kSharedBase) + " read, " + why);
    };
    if (unit->barrier) trap("which holds an mbarrier");
    if (!unit->written) trap("which nobody has written");
    if (unit->under_way) trap("whose copy nobody has waited for");
    if (!warp.knows(unit->writer, lane)) trap("race: which " + name(unit->writer) + " wrote with no barrier between");
    if (!unit->by_copy && unit->writer.time >= warp.fenced.of(unit->writer.agent)) {
      trap("which " + name(unit->writer) + " wrote with no fence.proxy.async after it");
    }
    ++unit->in_use;
  }
}

inline void Block::end_async_read(Warp& warp, int lane, uint32_t address, uint32_t bytes) {
  Unit* unit = &units_[(address - kSharedBase) / program.unit];
  Reader* reader = &readers_[(unit - units_.data()) * program.warps + warp.number];
  for (uint32_t i = 0; i < bytes; i += program.unit, ++unit, reader += program.warps) {
    --unit->in_use;
    reader->lane = lane;
    reader->time = warp.time;
  }
}

inline void Block::check_global(const std::string& who, uint64_t address, size_t bytes, size_t aligned, bool write) {
  if (address % aligned) throw Trap(who + ": a global address is not aligned to " + number(aligned));
  if (last_range_ && address >= last_range_->begin && address + bytes <= last_range_->end) return;
  for (const Range& range : memory_.ranges) {
    if (address >= range.begin && address + bytes <= range.end) {
      last_range_ = &range;
      return;
    }
  }
  std::string where;
  for (size_t i = 0; i < memory_.ranges.size(); ++i) {
    const int64_t offset = address - memory_.ranges[i].begin, size = memory_.ranges[i].end - memory_.ranges[i].begin;
    if (offset > -(1 << 20) && offset < size + (1 << 20)) {
      where += " (byte " + number(offset) + " of " + number(size) + " of tensor " + number(i) + ")";
    }
  }
  throw Trap(who + (write ? " writes" : " reads") + " global memory out of bounds" + where);
}
inline void Block::check_global(Warp& warp, int lane, uint64_t address, size_t bytes, size_t aligned, bool write) {
  if (last_range_ && address >= last_range_->begin && address + bytes <= last_range_->end && address % aligned == 0) {
    return;
  }
  check_global(warp.name(lane), address, bytes, aligned, write);
}

inline void Block::note_global_read(Warp& warp, int lane, uint64_t address, uint32_t bytes) {
  if (!memory_.written) return;
  Region* region = memory_.region(address);
  if (region->units.empty()) return;
  const size_t first = (address - region->begin) / program.global_unit;
  for (uint32_t i = 0; i < bytes / program.global_unit; ++i) {
    const GlobalUnit& unit = region->units[first + i];
    if (unit.block >= 0 && unit.block != block_) {
      throw Trap("race: " + warp.name(lane) + " reads global memory that block " + number(unit.block) + " wrote");
    }
    if (unit.block == block_ && !warp.knows(unit.writer, lane)) {
      throw Trap("race: " + warp.name(lane) + " reads global memory that " + name(unit.writer) +
                 " wrote with no barrier between");
    }
    Reader& reader = region->readers[(first + i) * program.warps + warp.number];
    reader.lane = reader.time == warp.time && reader.lane != lane ? kAllOf : lane;
    reader.time = warp.time;
  }
}

inline void Block::note_global_write(Warp& warp, int lane, uint64_t address, uint32_t bytes, const void* what) {
  Region* region = memory_.region(address);
  if (region->units.empty()) {
    memory_.written = true;
    region->units.resize((region->end - region->begin) / program.global_unit + 1);
    region->readers.resize(region->units.size() * program.warps);
  }
  const size_t first = (address - region->begin) / program.global_unit;
  for (uint32_t i = 0; i < bytes / program.global_unit; ++i) {
    GlobalUnit& unit = region->units[first + i];
    const uint32_t at = i * program.global_unit;
    const bool again = what && !std::memcmp(reinterpret_cast<const char*>(address) + at,
                                            static_cast<const char*>(what) + at, program.global_unit);
    if (unit.block >= 0 && unit.block != block_ && !again) {
      throw Trap("race: " + warp.name(lane) + " writes global memory that block " + number(unit.block) + " wrote");
    }
    if (unit.block == block_ && !again && !warp.knows(unit.writer, lane)) {
      throw Trap("race: " + warp.name(lane) + " writes global memory that " + name(unit.writer) +
                 " wrote with no barrier between");
    }
    Reader* reader = &region->readers[(first + i) * program.warps];
    for (int w = 0; w < program.warps; ++w, ++reader) {
      const Epoch read{static_cast<int16_t>(w), reader->lane, reader->time};
      if (reader->time && !warp.knows(read, lane)) {
        throw Trap("race: " + warp.name(lane) + " writes global memory that " + name(read) +
                   " read with no barrier between");
      }
      reader->time = 0;
    }
    unit = {block_, warp.now(lane)};
  }
}

// 32 banks are 4 bytes wide; accesses of 8 and 16 bytes a lane go in halves and quarters of the warp.
inline void Block::count_turns(const Warp&, const uint32_t* addresses, Lanes lanes, int bytes) {
  const int together = kLanes * 4 / std::max(bytes, 4), words = std::max(bytes, 4) / 4;
  for (int first = 0; first < kLanes; first += together) {
    uint32_t seen[kLanes * 4];
    int turns[32] = {}, count = 0, most = 0;
    for (int lane = first; lane < first + together; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (int word = 0; word < words; ++word) {
        const uint32_t which = addresses[lane] / 4 + word;
        if (std::find(seen, seen + count, which) != seen + count) continue;
        seen[count++] = which;
        most = std::max(most, ++turns[which % 32]);
      }
    }
    if (!count) continue;
    ++counts.shared_accesses;
    counts.shared_turns += most;
  }
}

}  // namespace ptx
