// treedecode._host: host-side structures without torch.
#include <string>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "prefix_index.h"

namespace py = pybind11;

namespace treedecode::host {
namespace {

// A contiguous 1-d int32 array. Other arrays are refused and not converted: a caller that passes one has a bug.
struct Int32Array {
  const int32_t* data;
  int64_t size;

  Int32Array(const py::array& array, const char* name) {
    if (!array.dtype().equal(py::dtype::of<int32_t>())) {
      throw py::type_error(std::string(name) + ": expected dtype int32, got " +
                           py::str(array.dtype()).cast<std::string>());
    }
    if (array.ndim() != 1 || !(array.flags() & py::array::c_style)) {
      throw py::value_error(std::string(name) + ": expected a contiguous 1-d array, got " +
                            std::to_string(array.ndim()) + " dimensions");
    }
    data = static_cast<const int32_t*>(array.data());
    size = array.size();
  }
};

py::array_t<int32_t> to_array(const std::vector<int32_t>& values) {
  return py::array_t<int32_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

// Runs work that may wait for the lock, without the GIL. The holder of the lock never needs the GIL, so that there is
// no deadlock.
template <typename F>
std::vector<int32_t> without_gil(F&& work) {
  py::gil_scoped_release release;
  return work();
}

py::tuple match(PrefixIndex& index, const py::array& tokens) {
  const Int32Array t(tokens, "tokens");
  const std::vector<int32_t> pages = without_gil([&] { return index.match(t.data, t.size); });
  const int64_t num_tokens = static_cast<int64_t>(pages.size()) * index.page_size();
  return py::make_tuple(to_array(pages), num_tokens);
}

py::array_t<int32_t> insert(PrefixIndex& index, const py::array& tokens, const py::array& pages) {
  const Int32Array t(tokens, "tokens"), p(pages, "pages");
  const int64_t num_whole = t.size / index.page_size();
  const bool partial = t.size % index.page_size() != 0;
  if (p.size != num_whole && !(partial && p.size == num_whole + 1)) {
    throw py::value_error("pages: expected the " + std::to_string(num_whole) + " whole pages of the tokens, got " +
                          std::to_string(p.size));
  }
  return to_array(without_gil([&] { return index.insert(t.data, p.data, num_whole); }));
}

py::array_t<int32_t> evict(PrefixIndex& index, int64_t num_pages, const py::array& refcount) {
  const Int32Array r(refcount, "refcount");
  if (num_pages < 0) throw py::value_error("num_pages: expected at least 0, got " + std::to_string(num_pages));
  return to_array(without_gil([&] { return index.evict(num_pages, r.data, r.size); }));
}

}  // namespace
}  // namespace treedecode::host

PYBIND11_MODULE(_host, m) {
  using namespace treedecode::host;
  m.doc() = "Host-side structures of treedecode.";
  py::class_<PrefixIndex>(m, "PrefixIndex", R"(Radix tree from token ids to the pages that hold their K and V.

Works in whole pages; thread-safe; token ids are compared, never only their hashes. The index owns no references to
pages: the caller retains the pages that `insert` returns, and drops those that `evict` and `clear` return.

Args:
    page_size: tokens per page, at least 1.)")
      .def(py::init<int64_t>(), py::arg("page_size"))
      .def_property_readonly("page_size", &PrefixIndex::page_size)
      .def("__len__", &PrefixIndex::num_pages, py::call_guard<py::gil_scoped_release>(), "Number of pages held.")
      .def("match", &match, py::arg("tokens"),
           R"(Finds the longest prefix of `tokens` that the index has, in whole pages.

Args:
    tokens: `[num_tokens]` int32 array.

Returns:
    `(pages, num_tokens)`: `[n]` int32 page ids and `n * page_size`. Adopt them before the next `evict`.)")
      .def("insert", &insert, py::arg("tokens"), py::arg("pages"), R"(Inserts the whole pages of `tokens`.

Args:
    tokens: `[num_tokens]` int32 array.
    pages: the `num_tokens // page_size` whole pages, int32; a partial last page may follow and is ignored.

Returns:
    int32 array of the pages newly held. Where the index has the tokens already, it keeps its pages.

Raises:
    ValueError: wrong number of pages, or a page that would be held twice; nothing is inserted.)")
      .def("evict", &evict, py::arg("num_pages"), py::arg("refcount"), R"(Evicts up to `num_pages` pages.

Evicts only pages with `refcount == 1`, least recently used leaves first, each branch from its end.

Args:
    num_pages: how many to evict at most.
    refcount: `[pool pages]` int32 array.

Returns:
    int32 array of the evicted pages, in order.)")
      .def(
          "pages", [](PrefixIndex& index) { return to_array(without_gil([&] { return index.pages(); })); },
          "Returns all pages held, ascending, int32.")
      .def(
          "clear", [](PrefixIndex& index) { return to_array(without_gil([&] { return index.clear(); })); },
          "Removes all pages and returns them, int32.")
      .def("check_integrity", &PrefixIndex::check_integrity, py::call_guard<py::gil_scoped_release>(),
           "Raises RuntimeError naming the invariant that is broken.");
}
