// Makes one KernelTable of the kernels included before it.

template <class Function>
void with_dot(Compute compute, Function&& function) {
  switch (compute) {
    case Compute::kFloat32:
      return function(DotFloat32{});
    case Compute::kBFloat16:
      return function(DotBFloat16{});
    case Compute::kInt8:
      return function(DotInt8{});
  }
}

constexpr KernelTable make_table(const char* name) {
  return {
      name,
      [](const FfnArgs& args, std::int64_t first, std::int64_t last) {
        with_dot(args.panels->compute,
                 [&](auto dot) { ffn_block<decltype(dot)>(args, first, last); });
      },
      [](const FfnArgs& args, std::int64_t tokens, std::int64_t first, std::int64_t last,
         void* inner) {
        with_dot(args.panels->compute,
                 [&](auto dot) { ffn_up_shared<decltype(dot)>(args, tokens, first, last, inner); });
      },
      [](const FfnArgs& args, std::int64_t tokens, std::int64_t first, std::int64_t last,
         const void* inner, float* sums) {
        with_dot(args.panels->compute, [&](auto dot) {
          ffn_down_shared<decltype(dot)>(args, tokens, first, last, inner, sums);
        });
      },
      ffn_norm,
      [](const AttentionArgs& args, std::int64_t first, std::int64_t last, std::int64_t first_panel,
         std::int64_t last_panel) {
        with_dot(args.panels->compute, [&](auto dot) {
          attention_qkv<decltype(dot)>(args, first, last, first_panel, last_panel);
        });
      },
      [](const AttentionArgs& args, std::int64_t first, std::int64_t last) {
        with_dot(args.panels->compute,
                 [&](auto dot) { attention_rows<decltype(dot)>(args, first, last); });
      },
      [](const AttentionArgs& args, std::int64_t first_head, std::int64_t last_head,
         void* context) {
        with_dot(args.panels->compute, [&](auto dot) {
          attention_context_shared<decltype(dot)>(args, first_head, last_head, context);
        });
      },
      [](const AttentionArgs& args, std::int64_t first_panel, std::int64_t last_panel,
         const void* context, float* sums) {
        with_dot(args.panels->compute, [&](auto dot) {
          attention_out_shared<decltype(dot)>(args, first_panel, last_panel, context, sums);
        });
      },
      attention_norm,
      [](Activation activation, const float* x, float* y, std::int64_t n) {
        with_activation(activation, [&](auto activate) {
          for (std::int64_t i = 0; i < n; i += kLanes) {
            const std::int64_t count = smaller(kLanes, n - i);
            store(y + i, activate(load(x + i, count)), count);
          }
        });
      },
  };
}
