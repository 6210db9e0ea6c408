// Mode words of the pipelined kernel with the queue `push`.
#include "pipeline.hpp"
#include "pipeline/kernel.cuh"

namespace flashmoe::pipeline {

static const Instance instances[] = {
    {moe_layer<1, Mode::words, false, true>, moe_layer<1, Mode::words, true, true>, 1, Mode::words,
     "pipeline, push, words"},
};
Instances pushed_words() { return {instances, sizeof instances / sizeof *instances}; }

}  // namespace flashmoe::pipeline
