// What a layer takes on a card: a question that needs no card.
#pragma once
#include "flashmoe/shape.hpp"

//! Workspace of the pipelined kernel for one PE [bytes], without trace, with any queue but `push`.
flashmoe::u64 device_workspace_bytes(const flashmoe::Shape& shape, const flashmoe::Tiling& tiling,
                                     flashmoe::u32 max_tokens, flashmoe::u32 num_workers,
                                     flashmoe::u32 num_domains);
