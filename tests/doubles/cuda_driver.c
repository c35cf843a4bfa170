/* A double of libcuda.so.1: the driver calls that libkvikio looks up and those that our own kernel
 * launcher makes, without a GPU. It proves our code, not NVIDIA's.
 *
 *   device memory   ranges of host memory, handed out by cuMemAlloc; a pointer outside them is a
 *                   host pointer, as cuPointerGetAttribute says
 *   streams, copies, events, pinned memory            cuda_streams.c
 *   contexts        one, for one device
 *   kernels         cuModuleGetFunction finds ucm_host_NAME in the library that ucm_double_kernels
 *                   was given, if the image is an ELF file (a cubin) that names NAME
 *
 * Everything is counted: see struct ucm_double_counts.
 */
#define _GNU_SOURCE
#include "cuda_double.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_RANGES 4096
#define DEVICE_ALIGNMENT 65536
#define THE_CONTEXT ((void *)0x1000)

/* ------------------------------------------------------------------ what tests ask and set */

static void *kernel_library;

struct ucm_double_counts ucm_counts;

void ucm_double_counts(struct ucm_double_counts *out) { *out = ucm_counts; }

/* Where the kernels are; 0 when it cannot be opened. */
int ucm_double_kernels(const char *path)
{
    kernel_library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    return kernel_library != NULL;
}

/* ------------------------------------------------------------------ device memory */

struct range {
    uintptr_t base;
    size_t size;
};

static struct range ranges[MAX_RANGES];
static pthread_mutex_t ranges_lock = PTHREAD_MUTEX_INITIALIZER;

/* The range that holds an address; size 0 when there is none. */
static struct range find_range(uintptr_t address)
{
    struct range found = {0, 0};
    pthread_mutex_lock(&ranges_lock);
    for (int i = 0; i < MAX_RANGES; ++i)
        if (ranges[i].size && address - ranges[i].base < ranges[i].size)
            found = ranges[i];
    pthread_mutex_unlock(&ranges_lock);
    return found;
}

/* Change the size-0 entry, or the one at `base`, to `changed`; 0 when there is none. */
static int replace_range(uintptr_t base, struct range changed)
{
    int done = 0;
    pthread_mutex_lock(&ranges_lock);
    for (int i = 0; i < MAX_RANGES && !done; ++i)
        if (base ? ranges[i].size && ranges[i].base == base : !ranges[i].size) {
            ranges[i] = changed;
            done = 1;
        }
    pthread_mutex_unlock(&ranges_lock);
    return done;
}

CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t size)
{
    size_t rounded = (size + DEVICE_ALIGNMENT - 1) / DEVICE_ALIGNMENT * DEVICE_ALIGNMENT;
    void *memory = size ? aligned_alloc(DEVICE_ALIGNMENT, rounded) : NULL;
    if (!memory || !replace_range(0, (struct range){(uintptr_t)memory, size})) {
        free(memory);
        return size ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_ERROR_INVALID_VALUE;
    }
    memset(memory, 0xA5, rounded); /* nobody may count on zeros */
    *out = (CUdeviceptr)memory;
    ++ucm_counts.allocations;
    return CUDA_SUCCESS;
}

CUresult cuMemFree_v2(CUdeviceptr address)
{
    if (!address || !replace_range(address, (struct range){0, 0}))
        return CUDA_ERROR_INVALID_VALUE;
    free((void *)address);
    ++ucm_counts.frees;
    return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr address)
{
    struct range found = find_range(address);
    if (!found.size)
        return CUDA_ERROR_INVALID_VALUE;
    *base = found.base;
    *size = found.size;
    return CUDA_SUCCESS;
}

int ucm_is_device(uintptr_t address) { return find_range(address).size != 0; }

/* ------------------------------------------------------------------ pointers */

enum { ATTRIBUTE_CONTEXT = 1, MEMORY_TYPE = 2, DEVICE_POINTER = 3, DEVICE_ORDINAL = 9 };

static CUresult pointer_attribute(void *out, int attribute, CUdeviceptr address)
{
    int is_device = find_range(address).size != 0;
    switch (attribute) {
    case ATTRIBUTE_CONTEXT:
        *(void **)out = is_device ? THE_CONTEXT : NULL;
        break;
    case MEMORY_TYPE:
        *(unsigned *)out = is_device ? 2 : 0;
        return CUDA_SUCCESS; /* also for what the driver does not know */
    case DEVICE_POINTER:
        *(CUdeviceptr *)out = is_device ? address : 0;
        break;
    case DEVICE_ORDINAL:
        *(int *)out = 0;
        break;
    default:
        return CUDA_ERROR_INVALID_VALUE;
    }
    return is_device ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuPointerGetAttribute(void *out, int attribute, CUdeviceptr address)
{
    return pointer_attribute(out, attribute, address);
}

CUresult cuPointerGetAttributes(unsigned count, int *attributes, void **out, CUdeviceptr address)
{
    for (unsigned i = 0; i < count; ++i)
        pointer_attribute(out[i], attributes[i], address);
    return CUDA_SUCCESS;
}

/* ------------------------------------------------------------------ device and context */

CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

/* NVRTC asks for private tables of the driver, and does without. */
CUresult cuGetExportTable(const void **table, const void *id)
{
    (void)id;
    *table = NULL;
    return CUDA_ERROR_NOT_FOUND;
}

CUresult cuDriverGetVersion(int *version)
{
    *version = 13000;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count)
{
    *count = 1;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(int *device, int ordinal)
{
    *device = ordinal;
    return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, int device)
{
    enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };
    (void)device;
    *value = attribute == CAPABILITY_MAJOR ? 9 : attribute == CAPABILITY_MINOR ? 0 : 1;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(void **context, int device)
{
    (void)device;
    *context = THE_CONTEXT;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(int device)
{
    (void)device;
    return CUDA_SUCCESS;
}

static __thread void *current_context;

CUresult cuCtxPushCurrent_v2(void *context)
{
    current_context = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(void **context)
{
    if (context)
        *context = current_context;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(void *context) { return cuCtxPushCurrent_v2(context); }

CUresult cuCtxGetCurrent(void **context)
{
    *context = current_context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(int *device)
{
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v4(void **context, ...)
{
    *context = THE_CONTEXT;
    return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v2(void **context, ...) __attribute__((alias("cuCtxCreate_v4")));
CUresult cuCtxCreate_v3(void **context, ...) __attribute__((alias("cuCtxCreate_v4")));

CUresult cuCtxDestroy_v2(void *context)
{
    (void)context;
    return CUDA_SUCCESS;
}

/* ------------------------------------------------------------------ kernels */

struct module {
    char *names; /* the image's symbol names, as far as a search finds them */
    size_t size;
};

typedef void (*host_kernel)(unsigned grid, unsigned block, void **arguments);

CUresult cuModuleLoadDataEx(void **out, const void *image, unsigned count, int *o, void **v)
{
    (void)count, (void)o, (void)v;
    if (memcmp(image, "\177ELF", 4) != 0)
        return CUDA_ERROR_INVALID_IMAGE;
    /* ELF64: the section headers end the file. */
    const uint8_t *bytes = image;
    uint64_t headers;
    uint16_t size, number;
    memcpy(&headers, bytes + 40, 8);
    memcpy(&size, bytes + 58, 2);
    memcpy(&number, bytes + 60, 2);
    struct module *module = malloc(sizeof *module);
    module->size = headers + (size_t)size * number;
    module->names = malloc(module->size);
    memcpy(module->names, image, module->size);
    *out = module;
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(void *module)
{
    free(((struct module *)module)->names);
    free(module);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(void **function, void *module, const char *name)
{
    struct module *image = module;
    char symbol[256];
    snprintf(symbol, sizeof symbol, "ucm_host_%s", name);
    int is_named = memmem(image->names, image->size, name, strlen(name) + 1) != NULL;
    *function = is_named && kernel_library ? dlsym(kernel_library, symbol) : NULL;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

/* A launch on its way: its parameters are copied, as the driver does. */
struct launch {
    host_kernel kernel;
    unsigned grid, block, num_parameters;
    uint64_t values[16];
};

static void run_launch(void *argument)
{
    struct launch *launch = argument;
    void *arguments[16];
    for (unsigned i = 0; i < launch->num_parameters; ++i)
        arguments[i] = &launch->values[i];
    launch->kernel(launch->grid, launch->block, arguments);
    free(launch);
}

CUresult cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                        void *stream, void **arguments, void **extra)
{
    (void)shared_bytes, (void)extra;
    if (!grid_x || grid_y != 1 || grid_z != 1 || !block_x || block_y != 1 || block_z != 1)
        return CUDA_ERROR_INVALID_VALUE;
    const unsigned *number = dlsym(kernel_library, "ucm_host_num_parameters");
    struct launch *launch = malloc(sizeof *launch);
    *launch = (struct launch){function, grid_x, block_x, *number, {0}};
    /* Narrower ones with what lies behind them: ctypes keeps 16 bytes for a number. */
    for (unsigned i = 0; i < *number; ++i)
        memcpy(&launch->values[i], arguments[i], sizeof launch->values[i]);
    ++ucm_counts.launches;
    return cuLaunchHostFunc(stream, run_launch, launch);
}

/* ------------------------------------------------------------------ errors */

CUresult cuGetErrorName(CUresult error, const char **name)
{
    *name = error ? "UCM_DOUBLE_CUDA_ERROR" : "CUDA_SUCCESS";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text)
{
    *text = error ? "an error of the driver's double" : "no error";
    return CUDA_SUCCESS;
}

/* Names without a version, for those who look them up so. */
PLAIN_NAME(cuCtxCreate, cuCtxCreate_v4)
PLAIN_NAME(cuCtxDestroy, cuCtxDestroy_v2)
PLAIN_NAME(cuCtxPushCurrent, cuCtxPushCurrent_v2)
PLAIN_NAME(cuCtxPopCurrent, cuCtxPopCurrent_v2)
PLAIN_NAME(cuMemGetAddressRange, cuMemGetAddressRange_v2)
PLAIN_NAME(cuDevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2)
