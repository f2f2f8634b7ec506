// In the place of CUDA's header of this name.
#pragma once
#include "emulation.h"
