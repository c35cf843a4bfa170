/* The driver's double, what is ordered: streams, events, copies, pinned host memory.
 *
 *   eager   what is enqueued is done when the call returns: as early as a GPU may
 *   lazy    it is done when somebody waits for it: as late as a GPU may (ucm_double_lazy). Who waits
 *           too little sees what was in memory before
 *
 *   operation   copy | free | record of an event | wait for a record | host function
 *   order       the number of the enqueuing call; a wait refers to a smaller one, so nothing circles
 *
 * The null stream and streams made without NON_BLOCKING wait for each other, as the driver's legacy
 * default stream does. One lock over all: the double is about order, not about speed.
 */
#define _GNU_SOURCE
#include "cuda_double.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_STREAMS 256
#define MAX_PINNED 1024

enum kind { COPY, FREE, RECORD, WAIT, CALL };

struct stream;

struct event {
    struct stream *stream;          /* of its last record */
    unsigned long order;            /* of that record; 0 before the first */
    unsigned long done;             /* order of the last record that was reached */
};

struct operation {
    unsigned long order;
    enum kind kind;
    uintptr_t to, from;
    size_t size;
    struct event *event;
    struct stream *recorder;        /* WAIT: who will reach the record */
    unsigned long target;           /* WAIT: the record's order */
    void (*function)(void *);
    struct operation *next;
};

struct stream {
    int is_used, is_blocking;
    struct operation *head, **tail;
};

static struct stream null_stream = {1, 1, NULL, &null_stream.head};
static struct stream streams[MAX_STREAMS];
static unsigned long last_order;
static int is_lazy;
static atomic_long copy_failures, copy_delay_us;
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

CUresult cuMemAlloc_v2(CUdeviceptr *, size_t);
CUresult cuMemFree_v2(CUdeviceptr);

/* ------------------------------------------------------------------ what tests set */

/* The next `count` copies are refused, when they are asked for. */
void ucm_double_fail_copies(long count) { copy_failures = count; }

/* Every copy takes this much longer. */
void ucm_double_copy_delay(long microseconds) { copy_delay_us = microseconds; }

/* ------------------------------------------------------------------ pinned host memory */

struct pinned {
    uintptr_t base;
    size_t size;
};

static struct pinned pinned_ranges[MAX_PINNED];

/* The entry that overlaps [base, base + size); with size 0 a free one. */
static struct pinned *find_pinned(uintptr_t base, size_t size)
{
    for (int i = 0; i < MAX_PINNED; ++i) {
        struct pinned *entry = &pinned_ranges[i];
        if (size ? entry->size && base < entry->base + entry->size && entry->base < base + size
                 : !entry->size)
            return entry;
    }
    return NULL;
}

static CUresult pin(uintptr_t base, size_t size)
{
    CUresult code = CUDA_SUCCESS;
    pthread_mutex_lock(&lock);
    struct pinned *entry = find_pinned(0, 0);
    if (!size)
        code = CUDA_ERROR_INVALID_VALUE;
    else if (find_pinned(base, size))
        code = CUDA_ERROR_ALREADY_REGISTERED;
    else if (!entry)
        code = CUDA_ERROR_OUT_OF_MEMORY;
    else {
        *entry = (struct pinned){base, size};
        ++ucm_counts.pinned_ranges;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

static CUresult unpin(uintptr_t base)
{
    pthread_mutex_lock(&lock);
    struct pinned *entry = find_pinned(base, 1);
    int is_known = entry && entry->base == base;
    if (is_known) {
        entry->size = 0;
        --ucm_counts.pinned_ranges;
    }
    pthread_mutex_unlock(&lock);
    return is_known ? CUDA_SUCCESS : CUDA_ERROR_NOT_REGISTERED;
}

CUresult cuMemHostAlloc(void **out, size_t size, unsigned flags)
{
    (void)flags;
    *out = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    CUresult code = *out ? pin((uintptr_t)*out, size) : CUDA_ERROR_OUT_OF_MEMORY;
    if (code)
        free(*out);
    return code;
}

CUresult cuMemFreeHost(void *memory)
{
    if (unpin((uintptr_t)memory))
        return CUDA_ERROR_INVALID_VALUE;
    free(memory);
    return CUDA_SUCCESS;
}

CUresult cuMemHostRegister_v2(void *memory, size_t size, unsigned flags)
{
    (void)flags;
    return pin((uintptr_t)memory, size);
}

CUresult cuMemHostUnregister(void *memory) { return unpin((uintptr_t)memory); }

/* ------------------------------------------------------------------ doing what was enqueued */

static void run_until(struct stream *stream, unsigned long order);

static int is_pageable(uintptr_t address)
{
    return !ucm_is_device(address) && !find_pinned(address, 1);
}

static void do_copy(const struct operation *operation)
{
    if (copy_delay_us)
        usleep(copy_delay_us);
    memcpy((void *)operation->to, (const void *)operation->from, operation->size);
    ++ucm_counts.copies;
    ucm_counts.copied_bytes += operation->size;
    ucm_counts.pageable_copies += is_pageable(operation->to) || is_pageable(operation->from);
}

static void do_operation(struct operation *operation)
{
    switch (operation->kind) {
    case COPY:
        do_copy(operation);
        break;
    case FREE:
        cuMemFree_v2(operation->to);
        break;
    case RECORD:
        operation->event->done = operation->order;
        break;
    case WAIT:
        if (operation->event->done < operation->target)
            run_until(operation->recorder, operation->target);
        break;
    case CALL:
        operation->function((void *)operation->to);
        break;
    }
}

/* Do a stream's operations up to an order, each after what it must follow on the null stream. */
static void run_until(struct stream *stream, unsigned long order)
{
    if (stream == &null_stream)
        for (int i = 0; i < MAX_STREAMS; ++i)
            if (streams[i].is_used && streams[i].is_blocking)
                run_until(&streams[i], order);
    while (stream->head && stream->head->order <= order) {
        struct operation *operation = stream->head;
        stream->head = operation->next;
        if (!stream->head)
            stream->tail = &stream->head;
        if (stream != &null_stream && stream->is_blocking)
            run_until(&null_stream, operation->order - 1);
        do_operation(operation);
        free(operation);
        --ucm_counts.waiting_operations;
    }
}

static struct stream *stream_of(void *handle)
{
    return (uintptr_t)handle <= 2 ? &null_stream : handle; /* 1 and 2 name default streams, too */
}

static CUresult enqueue(void *handle, struct operation wanted)
{
    struct operation *operation = malloc(sizeof *operation);
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(handle);
    *operation = wanted;
    operation->order = ++last_order;
    operation->next = NULL;
    if (wanted.kind == RECORD) {
        wanted.event->stream = stream;
        wanted.event->order = operation->order;
    }
    *stream->tail = operation;
    stream->tail = &operation->next;
    ++ucm_counts.waiting_operations;
    if (!is_lazy)
        run_until(stream, operation->order);
    pthread_mutex_unlock(&lock);
    return CUDA_SUCCESS;
}

static void finish_stream(void *handle)
{
    pthread_mutex_lock(&lock);
    run_until(stream_of(handle), last_order);
    pthread_mutex_unlock(&lock);
}

/* Put work off from now on, or do what was put off and nothing more of that. */
void ucm_double_lazy(int on)
{
    pthread_mutex_lock(&lock);
    is_lazy = on;
    run_until(&null_stream, last_order);
    for (int i = 0; i < MAX_STREAMS && !on; ++i)
        if (streams[i].is_used)
            run_until(&streams[i], last_order);
    pthread_mutex_unlock(&lock);
}

/* ------------------------------------------------------------------ copies */

CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, void *stream)
{
    if (copy_failures > 0 && copy_failures-- > 0)
        return CUDA_ERROR_UNKNOWN;
    return enqueue(stream, (struct operation){.kind = COPY, .to = to, .from = from, .size = size});
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, void *stream)
{
    return cuMemcpyAsync(to, (CUdeviceptr)from, size, stream);
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, void *stream)
{
    return cuMemcpyAsync((CUdeviceptr)to, from, size, stream);
}

/* kvikio gives attributes that end with the stream; done at once, which a GPU may. */
CUresult cuMemcpyBatchAsync_v2(CUdeviceptr *to, CUdeviceptr *from, size_t *sizes, size_t count, ...)
{
    for (size_t i = 0; i < count; ++i)
        do_copy(&(struct operation){.to = to[i], .from = from[i], .size = sizes[i]});
    return CUDA_SUCCESS;
}

CUresult cuMemcpyBatchAsync(CUdeviceptr *to, CUdeviceptr *from, size_t *sizes, size_t count, ...)
{
    return cuMemcpyBatchAsync_v2(to, from, sizes, count);
}

CUresult cuMemAllocAsync(CUdeviceptr *out, size_t size, void *stream)
{
    (void)stream;
    return cuMemAlloc_v2(out, size);
}

CUresult cuMemFreeAsync(CUdeviceptr address, void *stream)
{
    if (!ucm_is_device(address))
        return CUDA_ERROR_INVALID_VALUE;
    return enqueue(stream, (struct operation){.kind = FREE, .to = address});
}

/* ------------------------------------------------------------------ streams */

CUresult cuStreamCreate(void **out, unsigned flags)
{
    CUresult code = CUDA_ERROR_OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MAX_STREAMS && code; ++i)
        if (!streams[i].is_used) {
            streams[i] = (struct stream){1, !(flags & 1), NULL, &streams[i].head};
            *out = &streams[i];
            ++ucm_counts.streams;
            code = CUDA_SUCCESS;
        }
    pthread_mutex_unlock(&lock);
    return code;
}

CUresult cuStreamDestroy_v2(void *handle)
{
    finish_stream(handle);
    ((struct stream *)handle)->is_used = 0;
    --ucm_counts.streams;
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(void *handle)
{
    finish_stream(handle);
    ++ucm_counts.synchronizations;
    return CUDA_SUCCESS;
}

CUresult cuLaunchHostFunc(void *stream, void (*function)(void *), void *argument)
{
    struct operation call = {.kind = CALL, .to = (uintptr_t)argument, .function = function};
    return enqueue(stream, call);
}

/* ------------------------------------------------------------------ events */

CUresult cuEventCreate(void **out, unsigned flags)
{
    (void)flags;
    *out = calloc(1, sizeof(struct event));
    ++ucm_counts.events;
    return *out ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

/* The memory stays: a wait for it may still be on its way. */
CUresult cuEventDestroy_v2(void *event)
{
    (void)event;
    --ucm_counts.events;
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(void *event, void *stream)
{
    return enqueue(stream, (struct operation){.kind = RECORD, .event = event});
}

/* Waits for the last record before this call; one that comes later does not count. */
CUresult cuStreamWaitEvent(void *stream, void *handle, unsigned flags)
{
    (void)flags;
    struct event *event = handle;
    pthread_mutex_lock(&lock);
    struct operation wait = {
        .kind = WAIT, .event = event, .recorder = event->stream, .target = event->order};
    CUresult code = event->order ? enqueue(stream, wait) : CUDA_SUCCESS;
    pthread_mutex_unlock(&lock);
    return code;
}

/* Each question lets the stream do one operation more: who keeps asking gets there. */
CUresult cuEventQuery(void *handle)
{
    struct event *event = handle;
    pthread_mutex_lock(&lock);
    int is_done = event->done >= event->order;
    if (!is_done && event->stream->head)
        run_until(event->stream, event->stream->head->order);
    pthread_mutex_unlock(&lock);
    return is_done ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult cuEventSynchronize(void *handle)
{
    struct event *event = handle;
    pthread_mutex_lock(&lock);
    if (event->done < event->order)
        run_until(event->stream, event->order);
    pthread_mutex_unlock(&lock);
    ++ucm_counts.synchronizations;
    return CUDA_SUCCESS;
}

PLAIN_NAME(cuMemHostRegister, cuMemHostRegister_v2)
PLAIN_NAME(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2)
PLAIN_NAME(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2)
PLAIN_NAME(cuStreamDestroy, cuStreamDestroy_v2)
PLAIN_NAME(cuEventDestroy, cuEventDestroy_v2)
