// What this library is built for.
#pragma once
#if defined(__HIP__)
  #include "gfx942.hpp"
#else
  #include "sm90.hpp"
#endif
