// The instances of the pipelined kernel: a file each mode, so that they are compiled side by side.
#pragma once
#include "pipeline/launch.cuh"

namespace flashmoe::pipeline {

using Kernel = void (*)(Params);
struct Instance {
  Kernel kernel, traced;
  u32 groups;  // of 8 tokens in a block
  Mode mode;
  const char* name;
};
//! Of one mode, ascending by groups.
struct Instances {
  const Instance* first;
  u32 size;
};
Instances words();
Instances rows();
Instances tiles();
// the same for the queue `push`
Instances pushed_words();
Instances pushed_rows();
Instances pushed_tiles();

}  // namespace flashmoe::pipeline
