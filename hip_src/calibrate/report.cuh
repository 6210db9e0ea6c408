#pragma once
// Host side of the benchmarks: checked CUDA calls, device arrays, summaries, and the files that come out.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
#define CHECK(call) check((call), #call)

//! Array in device memory.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t size) : size_(size) { CHECK(cudaMalloc(&data_, size * sizeof(T))); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  void zero() { CHECK(cudaMemset(data_, 0, size_ * sizeof(T))); }
  std::vector<T> read() const {
    std::vector<T> values(size_);
    CHECK(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  std::size_t size_;
};

using Samples = std::vector<double>;

inline double mean(const Samples& x) {
  double sum = 0;
  for (double value : x) sum += value;
  return sum / static_cast<double>(x.size());
}

inline double deviation(const Samples& x) {
  const double centre = mean(x);
  double sum = 0;
  for (double value : x) sum += (value - centre) * (value - centre);
  return x.size() < 2 ? 0 : std::sqrt(sum / static_cast<double>(x.size() - 1));
}

//! Linear between the two nearest samples; q in [0, 1].
inline double quantile(Samples x, double q) {
  if (x.empty()) throw std::runtime_error("no samples");
  const double at = q * static_cast<double>(x.size() - 1);
  const auto low = x.begin() + static_cast<std::ptrdiff_t>(at);
  std::nth_element(x.begin(), low, x.end());
  if (low + 1 == x.end()) return *low;
  return *low + (at - std::floor(at)) * (*std::min_element(low + 1, x.end()) - *low);
}

inline double median(const Samples& x) { return quantile(x, 0.5); }

//! Under what circumstances a number was measured: key and JSON value.
class Conditions {
 public:
  Conditions& with(const std::string& key, const std::string& value) { return raw(key, "\"" + value + "\""); }
  Conditions& with(const std::string& key, const char* value) { return with(key, std::string(value)); }
  Conditions& with(const std::string& key, bool value) { return raw(key, value ? "true" : "false"); }
  template <class Number>
  Conditions& with(const std::string& key, Number value) {
    return raw(key, std::to_string(value));
  }
  const std::vector<std::pair<std::string, std::string>>& items() const { return items_; }

 private:
  Conditions& raw(const std::string& key, const std::string& value) {
    items_.emplace_back(key, value);
    return *this;
  }
  std::vector<std::pair<std::string, std::string>> items_;
};

//! Collects results and writes calibrate.json after every benchmark, so a fault loses nothing measured
//! before.
class Report {
 public:
  explicit Report(std::string folder) : folder_(std::move(folder)) {}

  void about(const std::string& key, const std::string& value) { about_.emplace_back(key, value); }

  //! One measured quantity with its spread.
  void add(const std::string& benchmark, const std::string& quantity, const std::string& unit,
           const Samples& samples, const Conditions& conditions = {}) {
    std::ostringstream line;
    line << "{\"benchmark\": \"" << benchmark << "\", \"quantity\": \"" << quantity << "\", \"unit\": \""
         << unit << "\", \"conditions\": {";
    const char* comma = "";
    for (const auto& [key, value] : conditions.items()) {
      line << comma << "\"" << key << "\": " << value;
      comma = ", ";
    }
    line << "}, \"samples\": " << samples.size();
    number(line, "median", median(samples));
    if (samples.size() > 1) {
      number(line, "mean", mean(samples));
      number(line, "std", deviation(samples));
      number(line, "min", quantile(samples, 0));
      number(line, "p01", quantile(samples, 0.01));
      number(line, "p99", quantile(samples, 0.99));
      number(line, "max", quantile(samples, 1));
    }
    line << "}";
    results_.push_back(line.str());
  }

  void write() const {
    std::ofstream file = open("calibrate.json");
    file << "{\n\"about\": {";
    for (std::size_t i = 0; i < about_.size(); ++i) {
      file << (i ? ",\n  " : "\n  ") << "\"" << about_[i].first << "\": \"" << about_[i].second << "\"";
    }
    file << "\n},\n\"results\": [";
    for (std::size_t i = 0; i < results_.size(); ++i) file << (i ? ",\n  " : "\n  ") << results_[i];
    file << "\n]\n}\n";
    if (!file) throw std::runtime_error("cannot write " + folder_ + "/calibrate.json");
  }

  std::ofstream open(const std::string& name) const {
    std::ofstream file(folder_ + "/" + name);
    if (!file) throw std::runtime_error("cannot write " + folder_ + "/" + name);
    return file;
  }

 private:
  static void number(std::ostream& out, const char* key, double value) {
    out << ", \"" << key << "\": ";
    if (!std::isfinite(value)) {
      out << "null";
      return;
    }
    char text[32];
    std::snprintf(text, sizeof text, "%.6g", value);
    out << text;
  }

  std::string folder_;
  std::vector<std::pair<std::string, std::string>> about_;
  std::vector<std::string> results_;
};
