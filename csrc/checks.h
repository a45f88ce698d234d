// Argument checks whose failure reaches Python as a ValueError in the project's one form:
//   <who>: <argument>=<got>, expected <allowed>. <What to do.>

#pragma once

#include <c10/util/Exception.h>

#define DYNABERT_CHECK_VALUE(condition, who, argument, got, allowed, what_to_do)            \
  TORCH_CHECK_VALUE(condition, who, ": ", argument, "=", got, ", expected ", allowed, ". ", \
                    what_to_do)
