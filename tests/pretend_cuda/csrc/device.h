// Devices, current streams and events of this process, as c10 asks a backend for them.
#pragma once

#include <cstdint>
#include <vector>

namespace pretend {

constexpr int kDevices = 16;

int current_device();
int64_t current_stream(int device);
void set_device(int device);
void set_stream(int device, int64_t stream);
int64_t new_stream(int device);

/// A stream's place in the trace is where the host has got to.
void host_waits_for_stream(int device, int64_t stream, const char* why);

/// Whether an event has come, when the host asks, only where it knows that already: it runs ahead of all devices.
void set_host_ahead(bool is_ahead);

/// Captures of CUDA graphs have numbers from 1 on. A stream belongs to one when it is begun on it, and when it waits
/// for what is captured, until the capture ends.
int64_t begin_capture(int device, int64_t stream);
void end_capture(int64_t capture);
/// The capture to which a stream belongs, or 0.
int64_t capture_of(int device, int64_t stream);
std::vector<int64_t> streams_in(int64_t capture);
/// A stream is to wait for what was queued in a capture, or in none: raises where CUDA refuses that.
void come_behind(int64_t capture, int device, int64_t stream);
/// Where a graph is being captured on a device, the host must not wait.
void check_not_capturing(int device, const char* what);

/// Whether operators do nothing that give back but what they have written, and copies. What is left is what it costs
/// the host to have them run.
void set_idle(bool idle);

} // namespace pretend
