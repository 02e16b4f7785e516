// Python's side of direct.h.
#include "direct.h"

#include <array>
#include <map>

namespace py = pybind11;

namespace fastattn {
namespace {

// Of torch's Python, looked up once.
struct Torch {
  PyObject *tensor, *parameter, *buffer;  // types
  // What may listen to a call, and what it answers when it does not.
  struct Listener {
    PyObject *ask, *silence;
  };
  std::array<Listener, 5> listeners;
  PyObject *is_negative, *handle_of, *tensors_of;
  std::array<std::pair<PyObject*, ScalarType>, 4> dtypes;
};

// Never freed: kernels are called for as long as Python lives.
PyObject* kept(const py::object& object) { return py::object(object).release().ptr(); }

const Torch* look_up() {
  const auto torch = py::module_::import("torch");
  const auto c = torch.attr("_C");
  const auto aoti = c.attr("_aoti"), nn = torch.attr("nn");
  const auto never = [](const py::object& ask, const py::object& silence) {
    return Torch::Listener{kept(ask), kept(silence)};
  };
  return new Torch{
      kept(torch.attr("Tensor")),
      kept(nn.attr("Parameter")),
      kept(nn.attr("Buffer")),
      {never(c.attr("_len_torch_dispatch_stack"), py::int_(0)),
       never(c.attr("_are_functorch_transforms_active"), py::bool_(false)),
       never(c.attr("_is_torch_function_mode_enabled"), py::bool_(false)),
       never(c.attr("_get_tracing_state"), py::none()),
       never(torch.attr("autograd").attr("_profiler_enabled"), py::bool_(false))},
      kept(torch.attr("Tensor").attr("is_neg")),
      kept(aoti.attr("unsafe_alloc_void_ptr_from_tensor")),
      kept(aoti.attr("alloc_tensors_by_stealing_from_void_ptrs")),  // the one for a single tensor leaks it
      {std::pair{kept(torch.attr("float32")), ScalarType::Float},
       {kept(torch.attr("bfloat16")), ScalarType::BFloat16},
       {kept(torch.attr("float16")), ScalarType::Half},
       {kept(torch.attr("float64")), ScalarType::Double}},
  };
}

// nullptr where a torch lacks something: then every call is the dispatcher's.
const Torch* torch() {
  static const Torch* const found = []() -> const Torch* {
    try {
      return look_up();
    } catch (py::error_already_set&) {
      return nullptr;
    }
  }();
  return found;
}

std::map<std::string, PyMethodDef>& direct_calls() {
  static std::map<std::string, PyMethodDef> calls;
  return calls;
}

// A tensor that is no more than its memory. autograd has zeros without any; that it must be negated, read() asks
// Python.
bool is_plain(const Tensor& tensor) {
  int32_t layout = 0, device = 0;
  const void* data = nullptr;
  return aoti_torch_get_layout(tensor.get(), &layout) == AOTI_TORCH_SUCCESS && layout == aoti_torch_layout_strided() &&
         aoti_torch_get_device_type(tensor.get(), &device) == AOTI_TORCH_SUCCESS &&
         device == aoti_torch_device_type_cpu() &&
         torch_get_const_data_ptr(tensor.get(), &data) == AOTI_TORCH_SUCCESS &&
         (data != nullptr || tensor.numel() == 0);
}

}  // namespace

bool nobody_listens() {
  for (const Torch::Listener& listener : torch()->listeners) {
    PyObject* const answer = PyObject_CallNoArgs(listener.ask);
    if (answer == nullptr) PyErr_Clear();
    Py_XDECREF(answer);  // none of these are freed: False, None and small integers
    if (answer != listener.silence) return false;
  }
  return true;
}

bool Argument<Tensor>::read(PyObject* from) {
  const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(from));
  if (type != torch()->tensor && type != torch()->parameter && type != torch()->buffer) return false;
  PyObject* const negative = PyObject_CallOneArg(torch()->is_negative, from);
  Py_XDECREF(negative);
  PyObject* const capsule = negative != Py_False ? nullptr : PyObject_CallOneArg(torch()->handle_of, from);
  if (capsule == nullptr) {
    PyErr_Clear();
    return false;
  }
  void* const handle = PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule));
  Py_DECREF(capsule);
  value_.emplace(static_cast<AtenTensorHandle>(handle));
  return is_plain(*value_);
}

bool Argument<int64_t>::read(PyObject* from) {
  if (!PyLong_CheckExact(from)) return false;
  int overflow = 0;
  value_ = PyLong_AsLongLongAndOverflow(from, &overflow);
  return overflow == 0;
}

bool Argument<double>::read(PyObject* from) {
  if (!PyFloat_CheckExact(from) && !PyLong_CheckExact(from)) return false;
  value_ = PyFloat_AsDouble(from);
  if (PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();  // an integer beyond all floats
  return false;
}

bool Argument<ScalarType>::read(PyObject* from) {
  for (const auto& [object, type] : torch()->dtypes) {
    if (object != from) continue;
    value_ = type;
    return true;
  }
  return false;
}

PyObject* to_python(std::initializer_list<const Tensor*> tensors) {
  PyObject* const handles = PyList_New(static_cast<Py_ssize_t>(tensors.size()));
  if (handles == nullptr) return nullptr;
  Py_ssize_t at = 0;
  for (const Tensor* tensor : tensors) {
    AtenTensorHandle handle = nullptr;
    PyObject* capsule = nullptr;
    if (aoti_torch_new_tensor_handle(tensor->get(), &handle) != AOTI_TORCH_SUCCESS)
      PyErr_NoMemory();
    else
      capsule = PyCapsule_New(handle, nullptr, nullptr);
    if (capsule == nullptr) {
      Py_DECREF(handles);
      return nullptr;
    }
    PyList_SET_ITEM(handles, at++, capsule);
  }
  PyObject* const result = PyObject_CallOneArg(torch()->tensors_of, handles);
  Py_DECREF(handles);
  return result;
}

void add_direct_call(const std::string& op, DirectCall call) {
  // By way of a type without arguments: that is how Python wants the other kinds of functions.
  const auto method = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call));
  direct_calls()[op] = PyMethodDef{nullptr, method, METH_FASTCALL, nullptr};
}

void add_direct(py::module_& m) {
  m.def(
      "direct",
      [](const std::string& name, const py::object& op, const py::args& defaults) -> py::object {
        const auto found = direct_calls().find(name);
        if (found == direct_calls().end() || torch() == nullptr) return py::none();
        found->second.ml_name = found->first.c_str();
        const py::tuple self = py::make_tuple(op) + defaults;
        return py::reinterpret_steal<py::object>(PyCFunction_New(&found->second, self.ptr()));
      },
      "direct(name, op, *defaults): a kernel as a function that passes torch's dispatcher by where that has nothing "
      "to\n"
      "add, else calls op, torch's entry. defaults: of the last parameters. None where there is no kernel <name>, or\n"
      "torch lacks what this takes. <op>_visible makes those of the forward's results only that people ask for.");
}

}  // namespace fastattn
