/* A compiled network. Link with -lm -lpthread. One handle serves one thread at a time. */
#ifndef OC_NET_H
#define OC_NET_H
#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#define OC_API __attribute__((visibility("default")))
#else
#define OC_API
#endif

typedef struct oc_net oc_net;

/* `dtype` is the ONNX type name; data is contiguous in C order. */
typedef struct {
  const char *name;
  const char *dtype;
  int rank;
  const long *shape;
} oc_port;

/* Maps the weights file that was written beside this library; NULL when it is missing or another's. */
OC_API oc_net *oc_create(const char *weights_path);

/* 0 when done. One thread, the state after oc_create, starts none. Results do not depend on it. */
OC_API int oc_set_threads(oc_net *net, int threads);

/* One pointer per port, in the order of oc_inputs and oc_outputs. Returns 0. */
OC_API int oc_run(oc_net *net, const void *const *inputs, void *const *outputs);

/* The same, and the time of each of oc_steps in microseconds. */
OC_API int oc_run_profiled(oc_net *net, const void *const *inputs, void *const *outputs, double *microseconds);

OC_API void oc_destroy(oc_net *net);

OC_API const oc_port *oc_inputs(int *count);
OC_API const oc_port *oc_outputs(int *count);
OC_API const char *const *oc_steps(int *count);

#ifdef __cplusplus
}
#endif
#endif
