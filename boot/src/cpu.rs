//! What the loader asks of the CPU before it makes page tables for it.

use core::arch::x86_64::__cpuid;

use x86_64::registers::{
    control::{Cr4, Cr4Flags},
    model_specific::Msr,
};

/// IA32_MISC_ENABLE, and its bit by which firmware hides execute-disable (Intel SDM volume 4,
/// "Architectural MSRs").
const MISC_ENABLE: u32 = 0x1a0;
const XD_BIT_DISABLE: u64 = 1 << 34;

/// EAX and EDX of an extended CPUID leaf, if there is such.
fn extended(leaf: u32) -> Option<[u32; 2]> {
    (__cpuid(0x8000_0000).eax >= leaf).then(|| {
        let result = __cpuid(leaf);
        [result.eax, result.edx]
    })
}

fn has_feature(bit: u32) -> bool {
    extended(0x8000_0001).is_some_and(|[_, edx]| edx & 1 << bit != 0)
}

/// How many bits a physical address has.
pub fn physical_bits() -> u32 {
    extended(0x8000_0008).map_or(36, |[eax, _]| eax & 0xff)
}

/// Whether there are pages of 1 GiB.
pub fn has_gib_pages() -> bool {
    has_feature(26)
}

/// Whether the CPU is in five-level paging.
///
/// # Safety
///
/// The CPU is at privilege level 0.
pub unsafe fn is_five_level() -> bool {
    Cr4::read().contains(Cr4Flags::L5_PAGING)
}

/// Whether page tables may forbid execution. Firmware can hide that on Intel's CPUs; it is made
/// visible again.
///
/// # Safety
///
/// The CPU is at privilege level 0.
pub unsafe fn allow_execute_disable() -> bool {
    const EXECUTE_DISABLE: u32 = 20;
    if !has_feature(EXECUTE_DISABLE) && has_misc_enable() {
        let mut misc_enable = Msr::new(MISC_ENABLE);
        // SAFETY: the register is there; the bit hides a feature that nothing uses as long as it is
        // hidden.
        unsafe { misc_enable.write(misc_enable.read() & !XD_BIT_DISABLE) };
    }
    has_feature(EXECUTE_DISABLE)
}

/// Whether this is a CPU of Intel's that has [`MISC_ENABLE`] with the bit: from family 6, model 0xd
/// on.
fn has_misc_enable() -> bool {
    let vendor = __cpuid(0);
    let intel = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    let signature = __cpuid(1).eax;
    let (family, model) = (signature >> 8 & 0xf, signature >> 12 & 0xf0 | signature >> 4 & 0xf);
    intel.as_flattened() == b"GenuineIntel" && (family > 6 || family == 6 && model >= 0xd)
}
