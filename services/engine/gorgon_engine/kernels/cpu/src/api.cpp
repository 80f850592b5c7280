// The C ABI. Shapes are checked by the Python launchers; a failed allocation comes back as a non-zero code.
#include <new>

#include "activations.h"
#include "forward.h"
#include "linear.h"
#include "linear_amx.h"
#include "pool.h"
#include "simd.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

using namespace gorgon;

#if defined(GORGON_AVX512)
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define GORGON_VECTOR_SET "avx512+vnni+bf16"
#elif defined(__AVX512VNNI__)
#define GORGON_VECTOR_SET "avx512+vnni"
#else
#define GORGON_VECTOR_SET "avx512"
#endif
#elif defined(GORGON_AVX2) && defined(__AVXVNNI__)
#define GORGON_VECTOR_SET "avx2+vnni"
#elif defined(GORGON_AVX2)
#define GORGON_VECTOR_SET "avx2"
#else
#define GORGON_VECTOR_SET "generic"
#endif

#define GORGON_API extern "C" __attribute__((visibility("default")))

GORGON_API const char* gorgon_instruction_set() {
#if defined(GORGON_AMX)
  if (amx_granted()) return GORGON_VECTOR_SET "+amx";
#endif
  return GORGON_VECTOR_SET;
}

GORGON_API void gorgon_set_num_threads(int count) { Pool::instance().set_num_threads(count); }

GORGON_API int gorgon_get_num_threads() { return Pool::instance().num_threads(); }

// Huge pages for weights that are streamed once a token: a sixth more bandwidth where the kernel grants them.
GORGON_API void gorgon_advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

GORGON_API int gorgon_linear(const PackedMatrix* matrix, const float* x, int64_t rows, float* out) {
  try {
    static thread_local ActivationBuffer buffer;
    Pool& pool = Pool::instance();
    const Activations act = buffer.get(rows, matrix->in_features);
    pool.run([&] {
      pool.for_each(rows, [&](int64_t row) {
        prepare_row(matrix->kind, x + row * matrix->in_features, matrix->in_features, act, row);
      });
      linear(pool, *matrix, act, rows, out, matrix->out_features, false);
    });
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

GORGON_API Model* gorgon_model_create(const ModelConfig* config) {
  try {
    return new Model(*config);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

GORGON_API void gorgon_model_destroy(Model* model) { delete model; }

// Null, or what is wrong with the call.
GORGON_API const char* gorgon_model_forward(Model* model, const ForwardArgs* args) {
  try {
    if (const char* problem = model->check(*args)) return problem;
    model->forward(*args);
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
}
