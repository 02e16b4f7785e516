// How kernels become torch ops, and how Python reaches them past torch's dispatcher.
//
// To read arguments by a schema and find the kernel takes torch 2 to 6 us, and a tiny problem's kernel a tenth of one.
// Where nobody listens, and every tensor is no more than its memory on the CPU, the dispatcher has nothing to add: then
// Python's call goes to the kernel itself, with arguments read by the types of its C++ function. In every other case,
// and where the kernel throws, torch's own entry is called with the same arguments.
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>

#include "launch.h"

namespace fastattn {

// Whether calls may pass the dispatcher by in the state that this thread is in: no mode, transform, trace or profiler.
bool nobody_listens();

// What Python gives for a parameter: read() is false where only the dispatcher knows what to do with it.
template <class T>
class Argument;

template <>
class Argument<Tensor> {
 public:
  bool read(PyObject* from);
  Tensor take() { return std::move(*value_); }

 private:
  std::optional<Tensor> value_;
};

template <>
class Argument<std::optional<Tensor>> {
 public:
  bool read(PyObject* from) { return from == Py_None || (given_ = value_.read(from)); }
  std::optional<Tensor> take() { return given_ ? std::optional<Tensor>(value_.take()) : std::nullopt; }

 private:
  bool given_ = false;
  Argument<Tensor> value_;
};

template <class T>
class NumberArgument {
 public:
  T take() const { return value_; }

 protected:
  T value_{};
};
template <>
class Argument<int64_t> : public NumberArgument<int64_t> {
 public:
  bool read(PyObject* from);
};
template <>
class Argument<double> : public NumberArgument<double> {
 public:
  bool read(PyObject* from);
};
template <>
class Argument<bool> : public NumberArgument<bool> {
 public:
  bool read(PyObject* from) {
    value_ = from == Py_True;
    return PyBool_Check(from);
  }
};
template <>
class Argument<ScalarType> : public NumberArgument<ScalarType> {
 public:
  bool read(PyObject* from);
};

// New references; nullptr with Python's error set.
PyObject* to_python(std::initializer_list<const Tensor*> tensors);  // a list
inline PyObject* to_python(const Tensor& tensor) {
  PyObject* const list = to_python({&tensor});
  PyObject* const only = list == nullptr ? nullptr : Py_NewRef(PyList_GET_ITEM(list, 0));
  Py_XDECREF(list);
  return only;
}
template <class... Tensors>
PyObject* to_python(const std::tuple<Tensors...>& tensors) {
  PyObject* const list = std::apply([](const auto&... each) { return to_python({&each...}); }, tensors);
  PyObject* const tuple = list == nullptr ? nullptr : PyList_AsTuple(list);
  Py_XDECREF(list);
  return tuple;
}

// The kernel's result for Python; nullptr without an error where the dispatcher must be asked.
template <class Result, class... Parameters, size_t... I>
PyObject* call_kernel(Result (*kernel)(Parameters...), PyObject* const* args, std::index_sequence<I...>) {
  std::tuple<Argument<Parameters>...> arguments;
  if (!(std::get<I>(arguments).read(args[I]) && ...)) return nullptr;
  std::optional<Result> result;
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    result.emplace(kernel(std::get<I>(arguments).take()...));
  } catch (const std::exception&) {
    // Kernels check all that they depend on first: the dispatcher's call says the same in torch's words.
  }
  PyEval_RestoreThread(thread);
  return result ? to_python(*result) : nullptr;
}

template <class Result, class... Parameters>
constexpr Py_ssize_t count_parameters(Result (*)(Parameters...)) {
  return sizeof...(Parameters);
}

// What Python calls. self: a tuple of torch's entry and the defaults of the last parameters. visible: how many results
// the kernel makes of those that torch's entry gives; 0: all.
template <auto kernel, Py_ssize_t visible = 0>
PyObject* call_directly(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kParameters = count_parameters(kernel);
  const Py_ssize_t missing = kParameters - count, defaults = PyTuple_GET_SIZE(self) - 1;
  if (missing >= 0 && missing <= defaults && nobody_listens()) {
    PyObject* all[kParameters];
    std::copy_n(args, count, all);
    for (Py_ssize_t i = 0; i < missing; i++) all[count + i] = PyTuple_GET_ITEM(self, 1 + defaults - missing + i);
    PyObject* const result = call_kernel(kernel, all, std::make_index_sequence<kParameters>{});
    if (result != nullptr || PyErr_Occurred() != nullptr) return result;
  }
  PyObject* const results = PyObject_Vectorcall(PyTuple_GET_ITEM(self, 0), args, static_cast<size_t>(count), nullptr);
  if (visible == 0 || results == nullptr || !PyTuple_CheckExact(results)) return results;
  PyObject* const some = visible == 1 ? Py_NewRef(PyTuple_GET_ITEM(results, 0)) : PyTuple_GetSlice(results, 0, visible);
  Py_DECREF(results);
  return some;
}

using DirectCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
void add_direct_call(const std::string& op, DirectCall call);

// Registers an op's kernels: the forward one as the op, too.
template <auto forward, class Library>
void implement(Library& library, const std::string& op) {
  library.impl((op + ".cpu").c_str(), TORCH_BOX(forward));
  library.impl((op + "_forward.cpu").c_str(), TORCH_BOX(forward));
  add_direct_call(op + "_forward", call_directly<forward>);
}
template <auto forward, auto backward, class Library>
void implement(Library& library, const std::string& op) {
  implement<forward>(library, op);
  library.impl((op + "_backward.cpu").c_str(), TORCH_BOX(backward));
  add_direct_call(op + "_backward", call_directly<backward>);
}
// For Python alone, a forward kernel that makes the first results only, as many as people ask for.
template <auto forward, Py_ssize_t visible = 1>
void implement_visible(const std::string& op) {
  add_direct_call(op + "_visible", call_directly<forward, visible>);
}

}  // namespace fastattn
