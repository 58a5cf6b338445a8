#include "core/capabilities.h"

#include <linux/capability.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>

namespace thor {

SetupError empty_bounding_set() {
  // EINVAL marks the end: kernels differ in how many capabilities they know.
  for (int cap = 0; ::prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) == 0; ++cap) {
  }
  return errno == EINVAL ? SetupError{} : failed(SetupStep::kCapabilities, 0);
}

SetupError drop_capabilities() {
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  std::array<__user_cap_data_struct, _LINUX_CAPABILITY_U32S_3> none{};
  if (::syscall(SYS_capset, &header, none.data()) != 0) return failed(SetupStep::kCapabilities, 1);
  return {};
}

SetupError set_no_new_privileges() {
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return failed(SetupStep::kNoNewPrivileges);
  return {};
}

}  // namespace thor
