// One table of kernels; compiled once for each instruction set, with FASTRLHF_TABLE naming the table.
#include "kernels.h"

#include "bias_gelu.h"
#include "gae.h"
#include "logits_kl.h"
#include "logprob.h"
#include "ppo_loss.h"
#include "ranking.h"
#include "rollout.h"

namespace fastrlhf {

extern const Kernels FASTRLHF_TABLE;
const Kernels FASTRLHF_TABLE = {
    logprob_statistics, logprob_backward, kl_statistics, kl_backward,        gae, shaped_rewards, moments,
    ppo_loss,           ranking,          bias_gelu,     bias_gelu_backward,
};

}  // namespace fastrlhf
