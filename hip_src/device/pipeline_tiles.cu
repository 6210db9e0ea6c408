// Mode tiles of the pipelined kernel.
#include "pipeline.hpp"
#include "pipeline/kernel.cuh"

namespace flashmoe::pipeline {

static const Instance instances[] = {
    {moe_layer<2, Mode::tiles, false, false>, moe_layer<2, Mode::tiles, true, false>, 2, Mode::tiles,
     "pipeline, tiles, blocks to 16"},
    {moe_layer<8, Mode::tiles, false, false>, moe_layer<8, Mode::tiles, true, false>, 8, Mode::tiles,
     "pipeline, tiles, blocks to 64"},
};
Instances tiles() { return {instances, sizeof instances / sizeof *instances}; }

}  // namespace flashmoe::pipeline
