// What the copy engine is told about packed weights.
#pragma once
#include "flashmoe/shape.hpp"

namespace flashmoe::sm90 {

//! Row tiles, [tiles][chunks], so that one instruction brings parts of several: the driver's
//! CUtensorMap, which only sm90.cuh knows.
struct alignas(128) TileMap {
  u64 words[16];
};

}  // namespace flashmoe::sm90
