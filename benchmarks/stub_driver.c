/* A stub libcuda.so.1 for a machine without a GPU: every call succeeds, nothing runs. benchmarks/host.py builds it,
   so that Triton's own launcher can be timed up to the call that would start a kernel. */
#include <stddef.h>
#include <string.h>

typedef void *handle;

static long launched;

long stub_launches(void) { return launched; }

int cuInit(unsigned flags) { return 0; }
int cuGetErrorString(int code, const char **text) { *text = "stub driver"; return 0; }
int cuCtxGetCurrent(handle *context) { *context = (handle)1; return 0; }
int cuCtxSetCurrent(handle context) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDevicePrimaryCtxRetain(handle *context, int device) { *context = (handle)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuStreamIsCapturing(handle stream, int *status) { *status = 0; return 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 1: *value = 1024; break;     /* threads per block */
    case 8: *value = 49152; break;    /* shared memory per block */
    case 10: *value = 32; break;      /* warp size */
    case 16: *value = 132; break;     /* multiprocessors */
    case 81: *value = 233472; break;  /* shared memory per multiprocessor */
    case 97: *value = 232448; break;  /* shared memory per block, opt-in */
    default: *value = 65536; break;
    }
    return 0;
}

int cuModuleLoadData(handle *module, const void *image) { *module = (handle)1; return 0; }
int cuModuleUnload(handle module) { return 0; }
int cuModuleGetFunction(handle *function, handle module, const char *name) { *function = (handle)1; return 0; }
int cuFuncGetAttribute(int *value, int attribute, handle function) { *value = attribute ? 0 : 1024; return 0; }
int cuFuncSetAttribute(handle function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(handle function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int *number, handle function, const void *config) { *number = 1; return 0; }
int cuPointerGetAttribute(void *value, int attribute, size_t pointer) { memcpy(value, &pointer, 8); return 0; }
int cuTensorMapEncodeTiled(void *map) { memset(map, 0, 128); return 0; }
int cuTensorMapEncodeIm2col(void *map) { memset(map, 0, 128); return 0; }
int cuLaunchKernelEx(const void *config, handle function, void **arguments, void **extra) { launched++; return 0; }
