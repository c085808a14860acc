/* What trains a GPT on a CPU, as one library, for quartz/kernels.py. */

#include "muon.c"
#include "network.c"
