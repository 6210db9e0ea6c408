// Mode rows of the pipelined kernel.
#include "pipeline.hpp"
#include "pipeline/kernel.cuh"

namespace flashmoe::pipeline {

static const Instance instances[] = {
    {moe_layer<4, Mode::rows, false, false>, moe_layer<4, Mode::rows, true, false>, 4, Mode::rows,
     "pipeline, rows, blocks to 32"},
};
Instances rows() { return {instances, sizeof instances / sizeof *instances}; }

}  // namespace flashmoe::pipeline
