// Microbenchmarks of this host, with the very loops that the CPU backend runs: what a `host` machine is
// fitted from.
#pragma once
#include <map>
#include <string>

#include "flashmoe/shape.hpp"

namespace flashmoe::host {

//! Runs for about `seconds`, on up to `num_threads` threads. Keys name quantity and unit.
std::map<std::string, double> benchmark(double seconds, u32 num_threads);

}  // namespace flashmoe::host
