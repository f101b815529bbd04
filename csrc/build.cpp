// What the package reads from the file before it loads it: the torch and the sources that this build belongs to, and the
// GPUs that its CUDA kernels were compiled for.
#include <torch/version.h>

#define LIGHTEDIT_TEXT(...) #__VA_ARGS__
#define LIGHTEDIT_VALUE(...) LIGHTEDIT_TEXT(__VA_ARGS__)

extern "C" __attribute__((used, visibility("default"))) const char lightedit_build[] =
    "lightedit built for torch=" TORCH_VERSION " from sources=" LIGHTEDIT_VALUE(LIGHTEDIT_SOURCES) " for gpus="
    LIGHTEDIT_VALUE(LIGHTEDIT_GPUS) " end";
