// What the package reads from the file before it loads it: the torch and the sources that this build belongs to.
#include <torch/version.h>

#define LIGHTEDIT_TEXT(name) #name
#define LIGHTEDIT_VALUE(name) LIGHTEDIT_TEXT(name)

extern "C" __attribute__((used, visibility("default"))) const char lightedit_build[] =
    "lightedit built for torch=" TORCH_VERSION " from sources=" LIGHTEDIT_VALUE(LIGHTEDIT_SOURCES) " end";
