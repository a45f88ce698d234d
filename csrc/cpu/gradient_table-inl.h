// Makes one GradientTable of the kernels included before it.

constexpr GradientTable make_gradients() {
  return {
      [](Compute compute, const Matrix& matrix, std::int64_t outputs, std::int64_t inputs,
         std::int64_t first, std::int64_t last, const Operand& to) {
        with_float_dot(compute, [&](auto dot) {
          pack_outputs<decltype(dot)>(matrix, outputs, inputs, first, last, to);
        });
      },
      [](Compute compute, const Matrix& matrix, std::int64_t inputs, std::int64_t outputs,
         std::int64_t first, std::int64_t last, const Operand& to) {
        with_float_dot(compute, [&](auto dot) {
          pack_inputs<decltype(dot)>(matrix, inputs, outputs, first, last, to);
        });
      },
      [](const FfnForwardArgs& args, std::int64_t first, std::int64_t last) {
        with_float_dot(args.compute,
                       [&](auto dot) { ffn_forward<decltype(dot)>(args, first, last); });
      },
      [](const FfnBackwardArgs& args, std::int64_t first, std::int64_t last) {
        with_float_dot(args.compute,
                       [&](auto dot) { ffn_backward<decltype(dot)>(args, first, last); });
      },
      [](const ProjectArgs& args, std::int64_t first, std::int64_t last) {
        with_float_dot(args.compute, [&](auto dot) { project<decltype(dot)>(args, first, last); });
      },
      [](const ProjectTailArgs& args, std::int64_t first, std::int64_t last) {
        with_float_dot(args.compute,
                       [&](auto dot) { project_tail<decltype(dot)>(args, first, last); });
      },
      [](const ProjectHiddenArgs& args, std::int64_t first, std::int64_t last) {
        with_float_dot(args.compute,
                       [&](auto dot) { project_hidden<decltype(dot)>(args, first, last); });
      },
      [](const TailBackwardArgs& args, std::int64_t chunk) {
        with_float_dot(args.compute, [&](auto dot) { tail_backward<decltype(dot)>(args, chunk); });
      },
      [](const CoreArgs& args, std::int64_t sequence, std::int64_t head) {
        with_float_dot(args.compute,
                       [&](auto dot) { core_forward<decltype(dot)>(args, sequence, head); });
      },
      [](const CoreArgs& args, std::int64_t sequence, std::int64_t head) {
        with_float_dot(args.compute,
                       [&](auto dot) { core_backward<decltype(dot)>(args, sequence, head); });
      },
      [](const WeightGradientArgs& args, std::int64_t first, std::int64_t last) {
        with_float_dot(args.compute,
                       [&](auto dot) { weight_gradient<decltype(dot)>(args, first, last); });
      },
  };
}
