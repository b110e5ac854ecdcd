// Devices, current streams and events of this process, as c10 asks a backend for them.
#pragma once

#include <cstdint>

namespace pretend {

constexpr int kDevices = 8;

int current_device();
int64_t current_stream(int device);
void set_device(int device);
void set_stream(int device, int64_t stream);
int64_t new_stream(int device);

/// A stream's place in the trace is where the host has got to.
void host_waits_for_stream(int device, int64_t stream, const char* why);

/// Whether a graph is being captured on a device. Then the host must not wait.
void set_capturing(int device, bool capturing);
void check_not_capturing(int device, const char* what);

} // namespace pretend
