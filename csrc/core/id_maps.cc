#include "core/id_maps.h"

#include "util/kernel_text.h"

namespace thor {
namespace {

std::string line(unsigned inside, unsigned outside) {
  return std::to_string(inside) + " " + std::to_string(outside) + " 1\n";
}

}  // namespace

SetupError write_id_maps(const std::string& proc_dir, const std::vector<IdMap>& maps) {
  std::string users;
  std::string groups;
  for (const IdMap& map : maps) {
    users += line(map.inside, map.outside_uid);
    groups += line(map.inside, map.outside_gid);
  }
  if (!write_text(proc_dir + "/setgroups", "deny")) return failed(SetupStep::kIdMaps, 0);
  if (!write_text(proc_dir + "/uid_map", users)) return failed(SetupStep::kIdMaps, 1);
  if (!write_text(proc_dir + "/gid_map", groups)) return failed(SetupStep::kIdMaps, 2);
  return {};
}

}  // namespace thor
