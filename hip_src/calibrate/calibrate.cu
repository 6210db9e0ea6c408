// Measures the parameters of the h200 machine with small kernels, each for one property of the device.
// calibrate --out FOLDER [--only NAME,NAME...]
#include <chrono>
#include <cstring>

#include "beside.cuh"
#include "compute.cuh"
#include "launches.cuh"
#include "signals.cuh"
#include "streams.cuh"

namespace {

struct Benchmark {
  const char* name;
  void (*measure)(Lab&);
};

constexpr Benchmark kBenchmarks[] = {
    {"timer", measure_timer},       {"bandwidth", measure_bandwidth}, {"reuse", measure_reuse},
    {"evenness", measure_evenness}, {"jitter", measure_jitter},       {"latency", measure_latency},
    {"launches", measure_launches}, {"signal", measure_ping_pong},    {"counter", measure_counter},
    {"tickets", measure_tickets},   {"matrix", measure_matrix},       {"reads", measure_reads},
};

std::string names() {
  std::string all;
  for (const Benchmark& each : kBenchmarks) all += std::string(all.empty() ? "" : ", ") + each.name;
  return all;
}

struct Options {
  std::string folder, only;
};

Options parse(int count, char** words) {
  Options options;
  for (int i = 1; i < count; i += 2) {
    const std::string word = words[i];
    if (i + 1 == count || (word != "--out" && word != "--only")) {
      throw std::invalid_argument("'" + word + "' (usage: calibrate --out FOLDER [--only NAME,NAME...])");
    }
    (word == "--out" ? options.folder : options.only) = words[i + 1];
  }
  if (options.folder.empty()) throw std::invalid_argument("--out FOLDER is missing");
  std::istringstream list(options.only);
  for (std::string name; std::getline(list, name, ',');) {
    bool known = false;
    for (const Benchmark& each : kBenchmarks) known |= name == each.name;
    if (!known) throw std::invalid_argument("--only " + name + " (one or more of " + names() + ")");
  }
  return options;
}

u32 describe_device(Report& report) {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  int driver = 0, runtime = 0, sm_khz = 0, memory_khz = 0;
  CHECK(cudaDriverGetVersion(&driver));
  CHECK(cudaRuntimeGetVersion(&runtime));
  CHECK(cudaDeviceGetAttribute(&sm_khz, cudaDevAttrClockRate, 0));
  CHECK(cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, 0));
  report.about("device", device.name);
  report.about("sms", std::to_string(device.multiProcessorCount));
  report.about("l2_bytes", std::to_string(device.l2CacheSize));
  report.about("memory_bytes", std::to_string(device.totalGlobalMem));
  report.about("most_sm_clock_khz", std::to_string(sm_khz));
  report.about("most_memory_clock_khz", std::to_string(memory_khz));
  report.about("cuda_driver", std::to_string(driver));
  report.about("cuda_runtime", std::to_string(runtime));
  if (device.major != 9) throw std::runtime_error(std::string(device.name) + " is not an sm_90 device");
  std::printf("%s, %d SMs, L2 %.0f MB, CUDA driver %d runtime %d\n", device.name, device.multiProcessorCount,
              device.l2CacheSize / 1048576.0, driver, runtime);
  return static_cast<u32>(device.multiProcessorCount);
}

//! Clocks and memory leave their idle state.
void warm_up(Lab& lab) {
  DeviceArray<SmCount> out(lab.num_sms);
  for (u32 i = 0; i < 60; ++i) {
    lab.run(stream_kernel, lab.num_sms, 32, lab.stream(4), lab.start(), u64{0}, u64{5'000'000}, out.data());
  }
}

}  // namespace

int main(int count, char** words) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  try {
    const Options options = parse(count, words);
    Report report(options.folder);
    report.write();  // a bad folder shows before the work, not after
    const std::string only = "," + options.only + ",";
    const auto begin = std::chrono::steady_clock::now();
    try {
      Lab lab(report, describe_device(report));
      warm_up(lab);
      for (const Benchmark& each : kBenchmarks) {
        if (!options.only.empty() && only.find(std::string(",") + each.name + ",") == std::string::npos)
          continue;
        each.measure(lab);
        report.write();
      }
    } catch (const std::exception& error) {
      std::string message = error.what();
      std::replace(message.begin(), message.end(), '"', '\'');
      report.about("stopped_by", message);
      report.write();
      throw;
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    std::printf("%.1f s\n", seconds.count());
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "calibrate: %s\n", error.what());
    return 1;
  }
}
