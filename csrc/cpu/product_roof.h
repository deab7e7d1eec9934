// What the CPU's product instructions reach; for benchmarks.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace vitfast {

// FLOP/s of all torch's threads together, two for each multiply-add, by the dtype's name: of those dtypes whose AVX-512
// or AVX2 instruction the extension uses here. Takes some milliseconds.
std::vector<std::pair<std::string, double>> product_roofs();

}  // namespace vitfast
