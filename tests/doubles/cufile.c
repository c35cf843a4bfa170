/* A double of libcufile.so.0: the cuFile calls that libkvikio looks up, as pread and pwrite into the
 * driver double's device memory. It proves our code, not NVIDIA's.
 *
 * Like the real one, a read past the end of the file is short and not an error. Tests can slow
 * transfers down and make them fail; everything is counted.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    int error, cuda_error;
} CUfileError;

typedef struct {
    int type;
    union {
        int fd;
        void *handle;
    } handle;
    const void *operations;
} CUfileDescriptor;

static const CUfileError SUCCESS = {0, 0};
static const CUfileError INTERNAL_ERROR = {5030, 0};

/* ------------------------------------------------------------------ what tests ask and set */

struct ucm_double_cufile_counts {
    unsigned long transfers, bytes, registrations, deregistrations, handles, most_at_once;
};

static atomic_ulong transfers, bytes, registrations, deregistrations, handles, most_at_once, now;
static atomic_long delay_us, failures, register_failures;

void ucm_double_cufile_counts(struct ucm_double_cufile_counts *out)
{
    *out = (struct ucm_double_cufile_counts){transfers, bytes, registrations,
                                             deregistrations, handles, most_at_once};
}

/* Every transfer takes this much longer. */
void ucm_double_cufile_delay(long microseconds) { delay_us = microseconds; }

/* The next `count` transfers fail with EIO. */
void ucm_double_cufile_fail(long count) { failures = count; }

/* The next `count` registrations of buffers fail. */
void ucm_double_cufile_refuse_buffers(long count) { register_failures = count; }

/* ------------------------------------------------------------------ files */

CUfileError cuFileHandleRegister(void **handle, CUfileDescriptor *descriptor)
{
    int *fd = malloc(sizeof *fd);
    *fd = descriptor->handle.fd;
    *handle = fd;
    ++handles;
    return SUCCESS;
}

void cuFileHandleDeregister(void *handle)
{
    --handles;
    free(handle);
}

static int take(atomic_long *counter)
{
    long left = *counter;
    while (left > 0)
        if (atomic_compare_exchange_weak(counter, &left, left - 1))
            return 1;
    return 0;
}

typedef ssize_t (*step)(int fd, char *memory, size_t size, off_t offset);

static ssize_t read_step(int fd, char *memory, size_t size, off_t offset)
{
    return pread(fd, memory, size, offset);
}

static ssize_t write_step(int fd, char *memory, size_t size, off_t offset)
{
    return pwrite(fd, memory, size, offset);
}

static ssize_t transfer(step move, int fd, char *memory, size_t size, off_t offset)
{
    size_t done = 0;
    unsigned long at_once = ++now, most = most_at_once;
    while (at_once > most && !atomic_compare_exchange_weak(&most_at_once, &most, at_once))
        ;
    if (delay_us > 0) {
        struct timespec delay = {delay_us / 1000000, delay_us % 1000000 * 1000};
        nanosleep(&delay, NULL);
    }
    int fails = take(&failures);
    while (!fails && done < size) {
        ssize_t moved = move(fd, memory + done, size - done, offset + (off_t)done);
        if (moved < 0 && errno == EINTR)
            continue;
        fails = moved < 0;
        if (moved <= 0)
            break;
        done += (size_t)moved;
    }
    --now;
    ++transfers;
    bytes += done;
    if (fails) {
        errno = EIO;
        return -1;
    }
    return (ssize_t)done;
}

ssize_t cuFileRead(void *handle, void *base, size_t size, off_t offset, off_t base_offset)
{
    return transfer(read_step, *(int *)handle, (char *)base + base_offset, size, offset);
}

ssize_t cuFileWrite(void *handle, const void *base, size_t size, off_t offset, off_t base_offset)
{
    return transfer(write_step, *(int *)handle, (char *)base + base_offset, size, offset);
}

CUfileError cuFileReadAsync(void *handle, void *base, size_t *size, off_t *offset,
                            off_t *base_offset, ssize_t *done, void *stream)
{
    (void)stream;
    *done = cuFileRead(handle, base, *size, *offset, *base_offset);
    return SUCCESS;
}

CUfileError cuFileWriteAsync(void *handle, void *base, size_t *size, off_t *offset,
                             off_t *base_offset, ssize_t *done, void *stream)
{
    (void)stream;
    *done = cuFileWrite(handle, base, *size, *offset, *base_offset);
    return SUCCESS;
}

/* ------------------------------------------------------------------ buffers */

CUfileError cuFileBufRegister(const void *base, size_t size, int flags)
{
    (void)base, (void)size, (void)flags;
    if (take(&register_failures))
        return INTERNAL_ERROR;
    ++registrations;
    return SUCCESS;
}

CUfileError cuFileBufDeregister(const void *base)
{
    (void)base;
    ++deregistrations;
    return SUCCESS;
}

/* ------------------------------------------------------------------ the driver */

CUfileError cuFileDriverOpen(void) { return SUCCESS; }
CUfileError cuFileDriverClose(void) { return SUCCESS; }
CUfileError cuFileDriverClose_v2(void) { return SUCCESS; }

CUfileError cuFileDriverGetProperties(void *properties)
{
    memset(properties, 0, 64);
    return SUCCESS;
}

CUfileError cuFileDriverSetPollMode(int poll, size_t size)
{
    (void)poll, (void)size;
    return SUCCESS;
}

CUfileError cuFileDriverSetMaxCacheSize(size_t size)
{
    (void)size;
    return SUCCESS;
}

CUfileError cuFileDriverSetMaxPinnedMemSize(size_t size)
{
    (void)size;
    return SUCCESS;
}

CUfileError cuFileGetVersion(int *version)
{
    *version = 1140;
    return SUCCESS;
}

CUfileError cuFileStreamRegister(void *stream, unsigned flags)
{
    (void)stream, (void)flags;
    return SUCCESS;
}

CUfileError cuFileStreamDeregister(void *stream)
{
    (void)stream;
    return SUCCESS;
}

/* Looked up by kvikio and never called by what we use of it. */
CUfileError cuFileBatchIOSetUp(void **batch, unsigned count)
{
    (void)batch, (void)count;
    return INTERNAL_ERROR;
}

CUfileError cuFileBatchIOSubmit(void *batch, unsigned count, void *items, unsigned flags)
{
    (void)batch, (void)count, (void)items, (void)flags;
    return INTERNAL_ERROR;
}

CUfileError cuFileBatchIOGetStatus(void *batch, unsigned least, unsigned *count, void *events,
                                   void *timeout)
{
    (void)batch, (void)least, (void)count, (void)events, (void)timeout;
    return INTERNAL_ERROR;
}

CUfileError cuFileBatchIOCancel(void *batch)
{
    (void)batch;
    return INTERNAL_ERROR;
}

void cuFileBatchIODestroy(void *batch) { (void)batch; }
