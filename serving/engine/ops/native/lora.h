// B(A(x)) with another adapter for each run of neighbouring rows. A(x) is computed before a linear;
// B, which lies in panels as the linear's own weight does, is multiplied into the sums of the linear
// before they are rounded. A(x) is rounded to a Number in between, as PEFT does.
#pragma once
#include "matrix.h"
#if defined(MATRIX)
#include "lora_matrix.h"
#else
#include "lora_vectors.h"
#endif
