// Mode rows of the pipelined kernel with the queue `push`.
#include "pipeline.hpp"
#include "pipeline/kernel.cuh"

namespace flashmoe::pipeline {

static const Instance instances[] = {
    {moe_layer<4, Mode::rows, false, true>, moe_layer<4, Mode::rows, true, true>, 4, Mode::rows,
     "pipeline, push, rows, blocks to 32"},
};
Instances pushed_rows() { return {instances, sizeof instances / sizeof *instances}; }

}  // namespace flashmoe::pipeline
