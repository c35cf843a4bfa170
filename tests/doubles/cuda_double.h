/* What the two files of the driver's double share. */
#pragma once
#include <stdatomic.h>
#include <stdint.h>

typedef int CUresult;
typedef uintptr_t CUdeviceptr;

enum { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_OUT_OF_MEMORY = 2 };
enum { CUDA_ERROR_INVALID_IMAGE = 200, CUDA_ERROR_NOT_FOUND = 500, CUDA_ERROR_NOT_READY = 600 };
enum { CUDA_ERROR_ALREADY_REGISTERED = 712, CUDA_ERROR_NOT_REGISTERED = 713 };
enum { CUDA_ERROR_UNKNOWN = 999 };

/* Sums over the process's life; the last four are what is there now. */
struct ucm_double_counts {
    atomic_ulong copies, copied_bytes, synchronizations, allocations, frees, launches;
    atomic_ulong pageable_copies; /* with host memory that is neither pinned nor registered */
    atomic_ulong streams, events, pinned_ranges, waiting_operations;
};

extern struct ucm_double_counts ucm_counts;

/* Whether an address is in device memory. */
int ucm_is_device(uintptr_t address);

CUresult cuLaunchHostFunc(void *stream, void (*function)(void *), void *argument);

#define PLAIN_NAME(name, versioned) \
    __typeof__(versioned) name __attribute__((alias(#versioned)));
