//! MSR 0x33 in software: for a hypervisor that looks at each instruction before it is executed.

use crate::hardware::{
    CORE_CAPABILITIES_SPLIT_LOCK, CPUID_CORE_CAPABILITIES, MsrFault, TEST_CTRL_SPLIT_LOCK, TestCtrl,
};

/// A 0x33 that no CPU knows of, and a CPUID that announces it.
///
/// Everything in this crate works on it as on a real one. Whoever keeps it raises the #ACs: while
/// [`is_on`](Self::is_on), at every split lock of the guest, before it executes. Each thread has
/// its own, with a [`Core`](crate::Core) of its own: nothing is shared with SMT siblings.
#[derive(Debug, Default)]
pub struct SoftwareTestCtrl(u64);

impl SoftwareTestCtrl {
    /// As after RESET.
    #[must_use]
    pub const fn new() -> Self {
        Self(0)
    }

    /// Whether split locks are to raise #AC.
    #[inline]
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.0 & TEST_CTRL_SPLIT_LOCK != 0
    }
}

impl TestCtrl for SoftwareTestCtrl {
    fn cpuid(&mut self, leaf: u32, _: u32) -> [u32; 4] {
        match leaf {
            // "GenuineIntel"
            0 => [7, 0x756E_6547, 0x6C65_746E, 0x4965_6E69],
            7 => [0, 0, 0, CPUID_CORE_CAPABILITIES],
            _ => [0; 4],
        }
    }

    fn read_core_capabilities(&mut self) -> Result<u64, MsrFault> {
        Ok(CORE_CAPABILITIES_SPLIT_LOCK)
    }

    fn read_test_ctrl(&mut self) -> Result<u64, MsrFault> {
        Ok(self.0)
    }

    fn write_test_ctrl(&mut self, value: u64) -> Result<(), MsrFault> {
        self.0 = value;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::SoftwareTestCtrl;
    use crate::{
        AcContext, Core, Cpu, Detection, Host, Msr, MsrWrite, Policy, PreemptionDisabled, RealBit,
        SldMode, Task, ThisCpu, Vcpu, Verdict, VmPolicy, Why, offline, online, task_switch, verify,
    };

    struct Thread {
        cpu: Cpu,
        core: Core,
        hardware: SoftwareTestCtrl,
    }

    impl PreemptionDisabled for Thread {
        type Hardware = SoftwareTestCtrl;

        fn this_cpu(&mut self) -> ThisCpu<'_, SoftwareTestCtrl> {
            ThisCpu { cpu: &mut self.cpu, core: &self.core, hardware: &mut self.hardware }
        }
    }

    fn started(mode: SldMode) -> Thread {
        let mut thread =
            Thread { cpu: Cpu::new(), core: Core::new(), hardware: SoftwareTestCtrl::new() };
        assert!(!thread.hardware.is_on());
        let online = online(&mut thread, mode);
        assert_eq!(online.detection, Detection::Works);
        assert_eq!(thread.cpu.mode(), mode);
        thread
    }

    const KERNEL: AcContext = AcContext { cpl: 0, cr0_am: true, eflags_ac: true };

    #[test]
    fn the_bit_is_as_the_mode_wants_it() {
        for (mode, on) in [(SldMode::Off, false), (SldMode::Warn, true), (SldMode::Fatal, true)] {
            let mut thread = started(mode);
            assert_eq!(thread.hardware.is_on(), on, "{mode}");
            assert!(offline(&mut thread).is_ok() && !thread.hardware.is_on());
        }
    }

    #[test]
    fn a_guest_has_it_as_a_real_one() {
        let mut thread = started(SldMode::Warn);
        let host = Host { configured: Policy::Warn, enforced: thread.cpu.mode() };
        let vm = VmPolicy::new(host, None, true).unwrap();
        let (mut vcpu, mut task) = (Vcpu::new(vm), Task::of_vcpu(1, vm));
        assert_eq!(task_switch(&mut thread, &task), Ok(None));
        let off = RealBit { on: false, why: Why::Load };
        assert_eq!(vcpu.load(&mut thread, &mut task), Ok(Some(off)));
        assert!(!thread.hardware.is_on());
        let on = RealBit { on: true, why: Why::GuestWrite };
        assert_eq!(
            vcpu.guest_wrmsr(&mut thread, &mut task, Msr::TestCtrl, 1 << 29),
            Ok(MsrWrite::Propagated(on))
        );
        assert!(thread.hardware.is_on());
        assert_eq!(vcpu.on_ac(&mut thread, &mut task, KERNEL), Ok(Verdict::Inject));
        assert_eq!(verify(&mut thread, &task), Ok(()));
        assert_eq!(vcpu.put(&mut thread, &mut task), Ok(None));
    }

    #[test]
    fn it_goes_off_for_the_one_who_was_warned() {
        let mut thread = started(SldMode::Warn);
        let host = Host { configured: Policy::Warn, enforced: thread.cpu.mode() };
        let vm = VmPolicy::new(host, None, false).unwrap();
        let (mut vcpu, mut task) = (Vcpu::new(vm), Task::of_vcpu(1, vm));
        assert_eq!(vcpu.load(&mut thread, &mut task), Ok(None));
        let real_bit = Some(RealBit { on: false, why: Why::Warn });
        let warned = Verdict::Warn { first: true, real_bit };
        assert_eq!(vcpu.on_ac(&mut thread, &mut task, KERNEL), Ok(warned));
        assert!(!thread.hardware.is_on());
        assert_eq!(vcpu.put(&mut thread, &mut task), Ok(None));
        let idle = Task::new(0);
        let on = RealBit { on: true, why: Why::TaskSwitch };
        assert_eq!(task_switch(&mut thread, &idle), Ok(Some(on)));
        assert!(thread.hardware.is_on());
        assert_eq!(verify(&mut thread, &idle), Ok(()));
    }
}
