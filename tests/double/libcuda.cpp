// The driver double: as many of the cu* functions as cudarc and the crate reach, over host memory and fibers.
// One translation unit, because its parts share the headers that take longest to compile.
#include "driver/control.cpp"
#include "driver/contexts.cpp"
#include "driver/errors.cpp"
#include "driver/memory.cpp"
#include "driver/allocation.cpp"
#include "driver/copies.cpp"
#include "driver/streams.cpp"
#include "driver/events.cpp"
#include "driver/capture.cpp"
#include "driver/graphs.cpp"
#include "driver/modules.cpp"
#include "driver/launches.cpp"
