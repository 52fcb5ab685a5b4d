//! The hardware as this crate sees it: one small trait, and the list of CPUs that have detection.

use core::fmt;

use crate::cpu::Cpu;
use crate::smt::Core;

/// MSR_TEST_CTRL, in newer manuals MSR_MEMORY_CTRL (Intel SDM vol. 4, "Model-Specific
/// Registers"). Core scope.
pub const MSR_TEST_CTRL: u32 = 0x33;

/// IA32_CORE_CAPABILITIES (Intel SDM vol. 4, "Architectural MSRs"). Read-only.
pub const MSR_CORE_CAPABILITIES: u32 = 0xCF;

/// Bit 29 of [`MSR_TEST_CTRL`]: a split lock raises #AC(0) instead of locking the bus.
pub const TEST_CTRL_SPLIT_LOCK: u64 = 1 << 29;

/// Bit 5 of [`MSR_CORE_CAPABILITIES`]: [`TEST_CTRL_SPLIT_LOCK`] works.
pub const CORE_CAPABILITIES_SPLIT_LOCK: u64 = 1 << 5;

/// CPUID.(7,0):EDX\[30\]: [`MSR_CORE_CAPABILITIES`] exists.
pub const CPUID_CORE_CAPABILITIES: u32 = 1 << 30;

/// Ice Lake server, Ice Lake D and Ice Lake client (all family 6) have the feature without
/// enumerating it; as in Linux, `arch/x86/kernel/cpu/bus_lock.c`.
const MODELS_NOT_ENUMERATING: [u32; 3] = [0x6A, 0x6C, 0x7E];

/// An access to an MSR raised #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrFault;

impl fmt::Display for MsrFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MSR access faulted")
    }
}

impl core::error::Error for MsrFault {}

/// CPUID and the two MSRs of the CPU that executes.
///
/// The accesses are fault-safe: 0x33 and 0xCF do not exist everywhere, and a hypervisor
/// underneath may hide what the model has, so #GP is an answer. Which CPUs are accessed at all is
/// decided here and not by the implementation: even a write of 0 to 0x33 has side effects on
/// models that are not on the list.
pub trait TestCtrl {
    /// CPUID: EAX, EBX, ECX, EDX.
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4];

    /// RDMSR of [`MSR_CORE_CAPABILITIES`].
    ///
    /// # Errors
    ///
    /// The access raised #GP.
    fn read_core_capabilities(&mut self) -> Result<u64, MsrFault>;

    /// RDMSR of [`MSR_TEST_CTRL`].
    ///
    /// # Errors
    ///
    /// The access raised #GP.
    fn read_test_ctrl(&mut self) -> Result<u64, MsrFault>;

    /// WRMSR of [`MSR_TEST_CTRL`].
    ///
    /// # Errors
    ///
    /// The access raised #GP; the MSR is unchanged.
    fn write_test_ctrl(&mut self, value: u64) -> Result<(), MsrFault>;
}

/// Proof that the caller cannot be preempted: implemented by the guard through which a hypervisor
/// reaches its per-CPU data.
///
/// Every operation that touches a task's flag, the real bit or a vCPU's "loaded" takes one,
/// because the three must agree whenever the scheduler looks. Preempted between the write of the
/// bit and that of the flag, the task switch would compare a stale flag and leave the next task
/// with the wrong bit. Migrated after the look at "loaded", the vCPU would have its wish written
/// to a CPU that it has left, where another task runs. And the task that an operation is given
/// must still be the one that this CPU runs when the bit is written.
///
/// An implementation must see to it that, while the guard lives, the caller stays on this CPU and
/// no task switch or other operation of this crate happens on it (preemption off, or interrupts
/// off; nothing here is called from NMI context).
///
/// A step ([`step_begin`](crate::step_begin) to [`step_end`](crate::step_end)) is two operations
/// of one whole: the caller stays on this CPU from the one to the other, while its guest executes
/// an instruction.
pub trait PreemptionDisabled {
    /// How this CPU's CPUID and MSRs are accessed.
    type Hardware: TestCtrl;

    /// The CPU that executes.
    fn this_cpu(&mut self) -> ThisCpu<'_, Self::Hardware>;
}

/// What the hypervisor keeps for the CPU that executes.
pub struct ThisCpu<'a, H> {
    /// This thread's own state.
    pub cpu: &'a mut Cpu,
    /// What this thread shares with its SMT siblings: one per core, not per thread.
    pub core: &'a Core,
    /// Its CPUID and MSRs.
    pub hardware: &'a mut H,
}

/// Whether this CPU is on the list: bit 29 of 0x33 is enumerated, or the model is known to have
/// it. On any other one 0x33 must not be touched.
pub(crate) fn on_the_list(hardware: &mut impl TestCtrl) -> bool {
    let [max_leaf, ebx, ecx, edx] = hardware.cpuid(0, 0);
    // "GenuineIntel": the models below are Intel's numbers.
    if [ebx, edx, ecx] != [0x756E_6547, 0x4965_6E69, 0x6C65_746E] {
        return false;
    }
    if max_leaf >= 7 && hardware.cpuid(7, 0)[3] & CPUID_CORE_CAPABILITIES != 0 {
        let capabilities = hardware.read_core_capabilities().unwrap_or(0);
        if capabilities & CORE_CAPABILITIES_SPLIT_LOCK != 0 {
            return true;
        }
    }
    let [signature, ..] = hardware.cpuid(1, 0);
    let family = signature >> 8 & 0xF;
    let model = (signature >> 4 & 0xF) | (signature >> 12 & 0xF0);
    family == 6 && MODELS_NOT_ENUMERATING.contains(&model)
}
