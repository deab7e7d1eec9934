// Runs a kernel's PTX, decoded by tests/helpers/ptx, on the CPU: the C interface.
#include "products.h"

namespace ptx {

const std::vector<Op>& ops() {
  static const std::vector<Op> all = [] {
    std::vector<Op> made;
    add_arithmetic(made);
    add_memory(made);
    add_tma(made);
    add_products(made);
    return made;
  }();
  return all;
}

}  // namespace ptx

extern "C" {

int op_count() { return static_cast<int>(ptx::ops().size()); }
const char* op_name(int op) { return ptx::ops()[op].name; }

// code: of each instruction op, guard, first operand, negated. sizes: instructions, operands, constants, bytes of
// registers, warps, bytes of a unit of shared memory, bytes of shared memory, bytes of a unit of global memory.
// is_register: of each operand.
ptx::Program* program_new(const int32_t* code, const int32_t* operands, const uint8_t* is_register,
                          const uint64_t* constants, const int32_t* special, const int32_t* sizes) {
  auto* program = new ptx::Program;
  for (int i = 0; i < sizes[0]; ++i) {
    program->code.push_back({code[4 * i], code[4 * i + 1], code[4 * i + 2], i, code[4 * i + 3] != 0});
  }
  program->operands.assign(operands, operands + sizes[1]);
  program->is_register.assign(is_register, is_register + sizes[1]);
  program->constants.resize(ptx::kConstantBytes * sizes[2]);
  for (int c = 0; c < sizes[2]; ++c) {
    uint8_t* to = &program->constants[ptx::kConstantBytes * c];
    for (int i = 0; i < ptx::kLanes; ++i) {
      std::memcpy(to + 8 * i, &constants[c], 8);
      std::memcpy(to + 8 * ptx::kLanes + 4 * i, &constants[c], 4);
      std::memcpy(to + 12 * ptx::kLanes + 2 * i, &constants[c], 2);
    }
  }
  program->special.assign(special, special + 9);
  program->register_bytes = sizes[3];
  program->warps = sizes[4];
  program->unit = sizes[5];
  program->shared_bytes = sizes[6];
  program->global_unit = sizes[7];
  return program;
}
void program_delete(ptx::Program* program) { delete program; }

// Every block of a grid, one after the other, in an order of the seed's. ranges: begins and ends of the memory that may
// be touched. executed: by op. totals: bytes read and written in global memory, copied by TMA in and out, by cp.async,
// read and written in shared memory, read there by wgmma; accesses of shared memory and the turns they took; waits for
// products that were not there. Returns the instruction at which it was trapped, or -1.
int program_run(const ptx::Program* program, const uint32_t* grid, const uint8_t* parameters, uint64_t parameter_bytes,
                const uint64_t* ranges, int range_count, uint64_t seed, int64_t* executed, int64_t* totals, char* error,
                int error_bytes) {
  ptx::Counts counts;
  counts.executed.resize(ptx::ops().size());
  ptx::Memory memory;
  for (int i = 0; i < range_count; ++i) memory.ranges.push_back({ranges[2 * i], ranges[2 * i + 1]});
  std::vector<ptx::Range> sorted = memory.ranges;
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  for (const ptx::Range& range : sorted) {
    if (memory.regions.empty() || range.begin >= memory.regions.back().end) memory.regions.push_back({range, {}, {}});
    memory.regions.back().end = std::max(memory.regions.back().end, range.end);
  }
  const uint32_t size[3] = {grid[0], grid[1], grid[2]};
  const uint64_t blocks = uint64_t{1} * grid[0] * grid[1] * grid[2];
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::mt19937_64 random(seed);
  std::shuffle(order.begin(), order.end(), random);
  for (const uint64_t i : order) {
    const uint32_t at[3] = {static_cast<uint32_t>(i % grid[0]), static_cast<uint32_t>(i / grid[0] % grid[1]),
                            static_cast<uint32_t>(i / grid[0] / grid[1])};
    ptx::Block block(*program, parameters, parameter_bytes, memory, static_cast<int32_t>(i), random(), counts);
    try {
      block.run(at, size);
    } catch (const std::exception& trap) {
      const std::string where =
          "block (" + ptx::number(at[0]) + ", " + ptx::number(at[1]) + ", " + ptx::number(at[2]) + "): ";
      std::snprintf(error, error_bytes, "%s", (where + trap.what()).c_str());
      return block.running;
    }
  }
  std::copy(counts.executed.begin(), counts.executed.end(), executed);
  const int64_t all[] = {counts.global_read,     counts.global_written, counts.copied_in,      counts.copied_out,
                         counts.async_copied,    counts.shared_read,    counts.shared_written, counts.operands_read,
                         counts.shared_accesses, counts.shared_turns,   counts.implied_waits};
  std::copy(std::begin(all), std::end(all), totals);
  return -1;
}
}
