// In place of the general kernel: there is none here.
#include "layer.hpp"

namespace flashmoe::general {

int refuse(const FlashmoeConfig&, const Tiling&) { return fail("the general kernel is not run by fibers"); }
FlashmoeLayer* make_layer() { return nullptr; }

}  // namespace flashmoe::general
