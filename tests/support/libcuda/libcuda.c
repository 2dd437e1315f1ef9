/* A stand-in for libcuda.so.1: what a driver answers without a context, for GPUs that an environment variable lists.
 *
 * STANDIN_GPUS has a row per GPU in CUDA's own order, fastest first: "name|major|minor|bytes|integrated|PCI address|UUID",
 * rows separated by ";". STANDIN_CUDA is the version that cuDriverGetVersion reports, STANDIN_INIT a code of cuInit.
 *
 * Rules, with their source:
 * - "Before calling any functions, cuInit() must be called. If cuInit() has not been called, any function from the
 *   driver API will return CUDA_ERROR_NOT_INITIALIZED" (CUDA driver API reference, Initialization); cuDriverGetVersion
 *   and cuGetErrorName work without.
 * - CUDA_VISIBLE_DEVICES is read by cuInit. Entries are numbers in CUDA's order, or UUIDs; an invalid one hides those after it; where
 *   none is left, cuInit returns CUDA_ERROR_NO_DEVICE. CUDA_DEVICE_ORDER=PCI_BUS_ID numbers by PCI address (CUDA
 *   programming guide, CUDA environment variables).
 * - cuDeviceGetUuid_v2 returns the 16 octets of a GPU's UUID, or of its instance's in MIG mode (CUDA driver API reference).
 * - After a fork, a child whose parent had called cuInit gets CUDA_ERROR_NOT_INITIALIZED from
 *   everything, cuInit too (seen on H100 in triton-lang/triton#10443).
 * - Ordinals and attributes outside their ranges are CUDA_ERROR_INVALID_DEVICE and CUDA_ERROR_INVALID_VALUE, and so is a
 *   buffer that is too short for an address.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101 };

typedef struct { char name[128]; int major, minor, integrated; size_t bytes; char pci[32], uuid[64]; } gpu;

static gpu all[16], visible[16];
static int count, process;

static int by_address(const void *one, const void *other) {
    return strcmp(((const gpu *)one)->pci, ((const gpu *)other)->pci);
}

static int read_gpus(void) {
    const char *row = getenv("STANDIN_GPUS");
    int n = 0;
    while (row && *row && n < 16) {
        gpu *g = &all[n];
        if (sscanf(row, "%127[^|]|%d|%d|%zu|%d|%31[^|]|%63[^;]", g->name, &g->major, &g->minor, &g->bytes,
                   &g->integrated, g->pci, g->uuid) == 7)
            n++;
        row = strchr(row, ';');
        if (row) row++;
    }
    const char *order = getenv("CUDA_DEVICE_ORDER");
    if (order && !strcmp(order, "PCI_BUS_ID")) qsort(all, n, sizeof(gpu), by_address);
    return n;
}

int cuInit(unsigned int flags) {
    const char *code = getenv("STANDIN_INIT"), *list = getenv("CUDA_VISIBLE_DEVICES");
    if (flags) return INVALID_VALUE;
    if (process && process != getpid()) return NOT_INITIALIZED;
    if (code && atoi(code)) return atoi(code);
    if (process) return SUCCESS;
    int n = read_gpus();
    count = 0;
    if (!list) {
        memcpy(visible, all, sizeof all);
        count = n;
    } else {
        while (*list) {
            size_t length = strcspn(list, ",");
            char *end;
            long index = strtol(list, &end, 10);
            if (end == list)
                for (index = 0; index < n && (strlen(all[index].uuid) != length || strncmp(all[index].uuid, list, length));)
                    index++;
            if (index < 0 || index >= n || count == 16) break;
            visible[count++] = all[index];
            list += length + (list[length] == ',');
        }
    }
    if (!count) return NO_DEVICE;
    process = getpid();
    return SUCCESS;
}

static int check(int device) {
    if (process != getpid()) return NOT_INITIALIZED;
    return device < 0 || device >= count ? INVALID_DEVICE : SUCCESS;
}

int cuDriverGetVersion(int *version) {
    const char *text = getenv("STANDIN_CUDA");
    *version = text ? atoi(text) : 12080;
    return SUCCESS;
}

int cuDeviceGetCount(int *result) {
    if (process != getpid()) return NOT_INITIALIZED;
    *result = count;
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
    int code = check(ordinal);
    if (!code) *device = ordinal;
    return code;
}

int cuDeviceGetName(char *name, int length, int device) {
    int code = check(device);
    if (!code) snprintf(name, length, "%s", visible[device].name);
    return code;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    int code = check(device);
    if (!code) *bytes = visible[device].bytes;
    return code;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int code = check(device);
    if (code) return code;
    if (attribute == 75) *value = visible[device].major;
    else if (attribute == 76) *value = visible[device].minor;
    else if (attribute == 18) *value = visible[device].integrated;
    else return INVALID_VALUE;
    return SUCCESS;
}

int cuDeviceGetUuid_v2(unsigned char *octets, int device) {
    int code = check(device);
    if (code) return code;
    const char *digit = visible[device].uuid + 4;
    for (int i = 0; i < 16; i++, digit += 2) {
        if (*digit == '-') digit++;
        sscanf(digit, "%2hhx", &octets[i]);
    }
    return SUCCESS;
}

int cuDeviceGetPCIBusId(char *address, int length, int device) {
    int code = check(device);
    if (code) return code;
    if (length < 13) return INVALID_VALUE;
    snprintf(address, length, "%s", visible[device].pci);
    return SUCCESS;
}

int cuGetErrorName(int code, const char **name) {
    switch (code) {
        case SUCCESS: *name = "CUDA_SUCCESS"; break;
        case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
        case NOT_INITIALIZED: *name = "CUDA_ERROR_NOT_INITIALIZED"; break;
        case NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
        case INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
        case 803: *name = "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"; break;
        default: *name = 0; return INVALID_VALUE;
    }
    return SUCCESS;
}
