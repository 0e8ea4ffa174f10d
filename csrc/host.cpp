// jepa_kernels._host: mask sampling and motion maps for data workers. pybind11 + NumPy, no torch;
// every call releases the GIL. Values are checked in Python (jepa/masks, jepa/batch.py); here only
// what would touch foreign memory.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "host/lists.h"
#include "host/masks.h"
#include "host/motion.h"
#include "host/philox.h"

namespace py = pybind11;

namespace jk_host {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using GridTuple = std::array<int64_t, 3>;

Grid checked_grid(const GridTuple& sizes) {
  for (const int64_t size : sizes) {
    if (size < 1 || size > 8192)
      throw py::value_error("_host: grid must have sizes from 1 to 8192, got " +
                            std::to_string(size) + ".");
  }
  return {sizes[0], sizes[1], sizes[2]};
}

void require(bool ok, const char* sentence) {
  if (!ok) throw py::value_error(sentence);
}

template <typename T>
Array<double> area_motion_of(const py::array& clip, const GridTuple& sizes,
                             const std::array<double, 4>& box, bool flip) {
  const Grid grid = checked_grid(sizes);
  const Array<T> pixels(clip);
  const bool bytes = std::is_same_v<T, uint8_t>;
  require(pixels.ndim() == 4 && pixels.shape(bytes ? 3 : 0) == 3,
          "_host.area_motion: clip must be uint8 [F, H, W, 3] or float [3, F, H, W].");
  const int64_t frames = pixels.shape(bytes ? 0 : 1), height = pixels.shape(bytes ? 1 : 2),
                width = pixels.shape(bytes ? 2 : 3);
  const auto inside = [](double start, double extent, int64_t size) {
    return start >= 0.0 && extent > 0.0 && start < static_cast<double>(size) &&
           start + extent <= static_cast<double>(size) + 1e-6;
  };
  require(frames > 0 && inside(box[0], box[2], height) && inside(box[1], box[3], width),
          "_host.area_motion: box must lie inside the frame.");
  Array<double> out({grid.t, grid.h, grid.w});
  const T* source = pixels.data();
  double* target = out.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    area_motion(source, frames, height, width, {box[0], box[1], box[2], box[3]}, flip, grid,
                target);
  }
  return out;
}

Array<double> area_motion_any(const py::array& clip, const GridTuple& grid,
                              const std::array<double, 4>& box, bool flip) {
  if (py::isinstance<py::array_t<uint8_t>>(clip))
    return area_motion_of<uint8_t>(clip, grid, box, flip);
  if (py::isinstance<py::array_t<float>>(clip)) return area_motion_of<float>(clip, grid, box, flip);
  require(py::isinstance<py::array_t<double>>(clip),
          "_host.area_motion: clip must be uint8, float32 or float64.");
  return area_motion_of<double>(clip, grid, box, flip);
}

Array<double> block_scores_of(const Array<double>& map, const GridTuple& block) {
  require(map.ndim() == 3, "_host.block_scores: map must be [T, H, W].");
  const Grid grid = checked_grid({map.shape(0), map.shape(1), map.shape(2)});
  for (int i = 0; i < 3; ++i)
    require(block[i] >= 1 && block[i] <= map.shape(i),
            "_host.block_scores: block must fit into the map.");
  std::vector<double> scores;
  const double* source = map.data();
  {
    const py::gil_scoped_release unlocked;
    block_scores(volume_table(source, grid), grid, block, scores);
  }
  Array<double> out({grid.t - block[0] + 1, grid.h - block[1] + 1, grid.w - block[2] + 1});
  std::copy(scores.begin(), scores.end(), out.mutable_data());
  return out;
}

py::tuple sample_context_of(const GridTuple& sizes, int64_t num_blocks,
                            const std::array<double, 6>& scales, int64_t context_steps,
                            int64_t max_attempts, uint64_t seed, uint64_t step,
                            const Array<int64_t>& samples, uint32_t size_stream,
                            uint32_t origin_stream, bool shared_block_size,
                            const std::optional<Array<double>>& motion_maps, double strength,
                            double random_rate) {
  const Grid grid = checked_grid(sizes);
  const int64_t batch = samples.size();
  require(context_steps >= 1 && context_steps <= grid.t,
          "_host.sample_context: context_steps must lie in the grid.");
  require(num_blocks >= 1 && max_attempts >= 1 && max_attempts * num_blocks < (int64_t{1} << 30),
          "_host.sample_context: num_blocks and max_attempts must be positive and below 2**30 "
          "together.");
  if (motion_maps)
    require(motion_maps->size() == batch * grid.tokens(),
            "_host.sample_context: motion_maps must be [B, T, H, W].");
  const MaskRequest request{grid,     num_blocks, scales,      context_steps, max_attempts,
                            seed,     step,       size_stream, origin_stream, shared_block_size,
                            strength, random_rate};
  py::array_t<bool> context({batch, grid.t, grid.h, grid.w});
  uint8_t* out = reinterpret_cast<uint8_t*>(context.mutable_data());
  const int64_t* keys = samples.data();
  const double* maps = motion_maps ? motion_maps->data() : nullptr;
  std::optional<std::array<int64_t, 3>> failed;
  {
    const py::gil_scoped_release unlocked;
    failed = sample_context(request, keys, batch, maps, out);
  }
  if (!failed) return py::make_tuple(context, py::none());
  return py::make_tuple(context, py::make_tuple((*failed)[0], (*failed)[1], (*failed)[2]));
}

template <typename T>
Array<T> array_from(const std::vector<T>& values, int64_t width) {
  const int64_t rows = static_cast<int64_t>(values.size()) / width;
  Array<T> out = width == 1 ? Array<T>(rows) : Array<T>({rows, width});
  std::copy(values.begin(), values.end(), out.mutable_data());
  return out;
}

PackedIds checked_ids(const Array<int64_t>& ids, const Array<int32_t>& cumulative,
                      const Grid& grid) {
  const int64_t sequences = cumulative.size() - 1;
  require(sequences >= 1 && cumulative.data()[0] == 0 && cumulative.data()[sequences] == ids.size(),
          "_host.mask_lists: cumulative lengths must run from 0 to the number of ids.");
  for (int64_t s = 0; s < sequences; ++s)
    require(cumulative.data()[s] <= cumulative.data()[s + 1],
            "_host.mask_lists: lengths must not be negative.");
  for (int64_t i = 0; i < ids.size(); ++i) {
    require(ids.data()[i] >= 0 && ids.data()[i] < grid.tokens(),
            "_host.mask_lists: ids must lie in the grid.");
  }
  return {ids.data(), cumulative.data()};
}

py::tuple mask_lists_of(const Array<int64_t>& context, const Array<int32_t>& context_cu,
                        const Array<int64_t>& target, const Array<int32_t>& target_cu,
                        const GridTuple& sizes, int64_t horizon) {
  const Grid grid = checked_grid(sizes);
  require(horizon >= 1 && context_cu.size() == target_cu.size(),
          "_host.mask_lists: horizon must be positive, context and target of one length.");
  const PackedIds seen = checked_ids(context, context_cu, grid),
                  hidden = checked_ids(target, target_cu, grid);
  const int64_t sequences = context_cu.size() - 1;
  MaskLists lists;
  {
    const py::gil_scoped_release unlocked;
    lists = mask_lists(seen, hidden, sequences, grid, horizon);
  }
  const auto sites = [](const SiteLists& from, int64_t width) {
    Array<int64_t> rows({static_cast<int64_t>(from.sequence.size()), width}),
        ids({static_cast<int64_t>(from.sequence.size()), width});
    std::copy(from.rows.begin(), from.rows.end(), rows.mutable_data());
    std::copy(from.ids.begin(), from.ids.end(), ids.mutable_data());
    return py::make_tuple(rows, ids, array_from(from.sequence, 1));
  };
  return py::make_tuple(array_from(lists.distance, 1), sites(lists.pairs, horizon + 1),
                        sites(lists.columns, grid.t));
}

Array<double> uniforms_of(uint64_t seed, uint64_t step, uint32_t sample, uint32_t stream,
                          int64_t count) {
  require(count >= 0 && count < (int64_t{1} << 32), "_host.uniforms: count must be below 2**32.");
  Array<double> out(count);
  double* target = out.mutable_data();
  const Uniforms numbers{seed, sample, step, stream};
  {
    const py::gil_scoped_release unlocked;
    double two[2];
    for (int64_t i = 0; i < count; ++i) {
      if (i % 2 == 0) numbers.pair(static_cast<uint32_t>(i / 2), two);
      target[i] = two[i % 2];
    }
  }
  return out;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cpp_standard"] = static_cast<int64_t>(__cplusplus);
  info["pybind11"] =
      PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
#if defined(__x86_64__)
  info["architecture"] = "x86_64";
#elif defined(__aarch64__)
  info["architecture"] = "aarch64";
#else
  info["architecture"] = "other";
#endif
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  info["fma"] = true;
#else
  info["fma"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace jk_host

PYBIND11_MODULE(_host, m) {
  using namespace jk_host;
  m.doc() =
      "Host code of jepa_kernels for data workers: masks, motion maps, index lists; NumPy in, "
      "NumPy out.";
  m.def("area_motion", &area_motion_any, py::arg("clip"), py::arg("grid"), py::arg("box"),
        py::arg("flip"),
        "[T, H, W] area-averaged motion of one clip inside a box (top, left, height, width).");
  m.def("block_scores", &block_scores_of, py::arg("motion_map"), py::arg("block"),
        "Mean of the map in the block at every origin.");
  m.def("sample_context", &sample_context_of, py::kw_only(), py::arg("grid"), py::arg("num_blocks"),
        py::arg("scales"), py::arg("context_steps"), py::arg("max_attempts"), py::arg("seed"),
        py::arg("step"), py::arg("samples"), py::arg("size_stream"), py::arg("origin_stream"),
        py::arg("shared_block_size"), py::arg("motion_maps"), py::arg("strength"),
        py::arg("random_rate"),
        "([B, T, H, W] bool, block size that hid everything or None) of one mask set.");
  m.def("mask_lists", &mask_lists_of, py::arg("context_ids"), py::arg("context_cu"),
        py::arg("target_ids"), py::arg("target_cu"), py::arg("grid"), py::arg("horizon"),
        "(distance, pairs (rows, ids, sequence), columns (rows, ids, sequence)) of packed ids.");
  m.def("uniforms", &uniforms_of, py::arg("seed"), py::arg("step"), py::arg("sample"),
        py::arg("stream"), py::arg("count"),
        "The first `count` numbers of a counter-based stream.");
  m.def("build_info", &build_info, "Compiler and instruction set of this module.");
}
