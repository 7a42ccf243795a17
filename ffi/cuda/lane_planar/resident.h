// How many clusters run at once, for the models that choose configurations without asking the driver.
#pragma once

namespace jaxzip::lane_planar {

// Clusters of 1..8 CTAs that an H200 runs at once, with one and with two CTAs an SM (GPCs have 16 or 18 SMs, some fewer).
constexpr int kResident[2][8] = {{132, 66, 39, 30, 22, 17, 15, 15}, {264, 132, 79, 62, 47, 39, 32, 30}};

}  // namespace jaxzip::lane_planar
