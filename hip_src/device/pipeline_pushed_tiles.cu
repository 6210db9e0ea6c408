// Mode tiles of the pipelined kernel with the queue `push`.
#include "pipeline.hpp"
#include "pipeline/kernel.cuh"

namespace flashmoe::pipeline {

static const Instance instances[] = {
    {moe_layer<2, Mode::tiles, false, true>, moe_layer<2, Mode::tiles, true, true>, 2, Mode::tiles,
     "pipeline, push, tiles, blocks to 16"},
    {moe_layer<8, Mode::tiles, false, true>, moe_layer<8, Mode::tiles, true, true>, 8, Mode::tiles,
     "pipeline, push, tiles, blocks to 64"},
};
Instances pushed_tiles() { return {instances, sizeof instances / sizeof *instances}; }

}  // namespace flashmoe::pipeline
