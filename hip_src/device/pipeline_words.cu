// Mode words of the pipelined kernel.
#include "pipeline.hpp"
#include "pipeline/kernel.cuh"

namespace flashmoe::pipeline {

static const Instance instances[] = {
    {moe_layer<1, Mode::words, false, false>, moe_layer<1, Mode::words, true, false>, 1, Mode::words,
     "pipeline, words"},
};
Instances words() { return {instances, sizeof instances / sizeof *instances}; }

}  // namespace flashmoe::pipeline
