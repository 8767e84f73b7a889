/* Prints the digit in each image on standard input; an image is 8 lines of 8 numbers from 0 to 16. */
#include <digits.h>

#include <stdio.h>

enum { PIXELS = 64, CLASSES = 10 };

static int read_image(float *image) {
  for (int i = 0; i < PIXELS; ++i) {
    if (scanf("%f", &image[i]) != 1) return 0;
    image[i] /= 16;
  }
  return 1;
}

static int largest(const float *scores) {
  int best = 0;
  for (int i = 1; i < CLASSES; ++i)
    if (scores[i] > scores[best]) best = i;
  return best;
}

int main(int argc, char **argv) {
  digits_handle *net = argc == 2 ? digits_create(argv[1]) : NULL;
  if (!net) {
    fprintf(stderr, "usage: classify digits.weights < images\n");
    return 1;
  }
  float image[PIXELS], scores[CLASSES];
  const void *inputs[] = {image};
  void *outputs[] = {scores};
  while (read_image(image)) {
    digits_run(net, inputs, outputs);
    printf("%d\n", largest(scores));
  }
  digits_destroy(net);
  return 0;
}
