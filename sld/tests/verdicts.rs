//! `verdicts.csv`, row by row: the verdict table expanded to every input, written apart from this
//! implementation. Through the public API, as a hypervisor would.

use sld::{
    AcContext, Core, Cpu, Host, Msr, MsrFault, PerSecond, Policy, PreemptionDisabled, SldMode,
    Task, TestCtrl, ThisCpu, Vcpu, Verdict, VmPolicy, online, task_switch,
};

const BIT: u64 = 1 << 29;

/// A CPU that enumerates detection, or has none.
struct Hardware {
    has_sld: bool,
    test_ctrl: u64,
}

impl TestCtrl for Hardware {
    fn cpuid(&mut self, leaf: u32, _: u32) -> [u32; 4] {
        match leaf {
            0 => [7, 0x756E_6547, 0x6C65_746E, 0x4965_6E69],
            7 => [0, 0, 0, u32::from(self.has_sld) << 30],
            _ => [0; 4],
        }
    }

    fn read_core_capabilities(&mut self) -> Result<u64, MsrFault> {
        if self.has_sld { Ok(1 << 5) } else { Err(MsrFault) }
    }

    fn read_test_ctrl(&mut self) -> Result<u64, MsrFault> {
        if self.has_sld { Ok(self.test_ctrl) } else { Err(MsrFault) }
    }

    fn write_test_ctrl(&mut self, value: u64) -> Result<(), MsrFault> {
        self.test_ctrl = value;
        if self.has_sld { Ok(()) } else { Err(MsrFault) }
    }
}

struct Guard {
    cpu: Cpu,
    core: Core,
    hardware: Hardware,
}

impl PreemptionDisabled for Guard {
    type Hardware = Hardware;

    fn this_cpu(&mut self) -> ThisCpu<'_, Hardware> {
        ThisCpu { cpu: &mut self.cpu, core: &self.core, hardware: &mut self.hardware }
    }
}

fn boot(has_sld: bool, mode: SldMode) -> Guard {
    let hardware = Hardware { has_sld, test_ctrl: 0 };
    let mut guard = Guard { cpu: Cpu::new(), core: Core::new(), hardware };
    let _ = online(&mut guard, mode);
    guard
}

/// The verdict in a host with this policy on a VM with this policy of its own.
fn verdict(
    has_sld: bool,
    configured: Policy,
    own: Option<Policy>,
    exposed: bool,
    virtual_bit: bool,
    ac: AcContext,
) -> &'static str {
    let mut guard = boot(has_sld, configured.mode());
    let host = Host { configured, enforced: guard.cpu.mode() };
    let vm = VmPolicy::new(host, own, exposed).unwrap();
    assert_eq!(vm.exposed(), exposed);
    let (mut task, mut vcpu) = (Task::of_vcpu(0, vm), Vcpu::new(vm));
    task_switch(&mut guard, &task).unwrap();
    vcpu.load(&mut guard, &mut task).unwrap();
    if virtual_bit {
        let _ = vcpu.guest_wrmsr(&mut guard, &mut task, Msr::TestCtrl, BIT).unwrap();
    }
    assert_eq!(vcpu.virtual_bit(), virtual_bit);
    vcpu.on_ac(&mut guard, &mut task, ac).unwrap().as_str()
}

#[test]
fn every_row_of_the_table() {
    let mut rows = include_str!("verdicts.csv").lines();
    assert_eq!(rows.next(), Some("host_sld,mode,exposed,virtual_bit,cpl,cr0_am,eflags_ac,verdict"));
    let mut seen = 0;
    for row in rows {
        let fields: Vec<&str> = row.split(',').collect();
        let [has_sld, mode, exposed, virtual_bit, cpl, am, ac, expected] = fields[..] else {
            panic!("{row}");
        };
        let flag = |field: &str| match field {
            "0" => false,
            "1" => true,
            _ => panic!("{row}"),
        };
        let mode: Policy = mode.parse().unwrap();
        let ac = AcContext { cpl: cpl.parse().unwrap(), cr0_am: flag(am), eflags_ac: flag(ac) };
        let (has_sld, exposed, virtual_bit) = (flag(has_sld), flag(exposed), flag(virtual_bit));
        assert_eq!(verdict(has_sld, mode, None, exposed, virtual_bit, ac), expected, "{row}");
        // To a VM, a policy of its own is what the host's mode is.
        if mode == Policy::Fatal {
            let own = verdict(has_sld, Policy::Warn, Some(mode), exposed, virtual_bit, ac);
            assert_eq!(own, expected, "{row}, in a host that warns");
        }
        seen += 1;
    }
    // 16 of CPL, AM and AC each: three modes without detection; off; and for warn and fatal not
    // exposed, exposed, exposed and set.
    assert_eq!(seen, 16 * (3 + 1 + 2 * 3));
}

/// By mistake of a caller: no CPU of a fatal host lets anything pass, whatever was granted.
#[test]
fn a_policy_that_another_host_has_granted_is_not_kept() {
    let mut guard = boot(true, SldMode::Fatal);
    let host = Host { configured: Policy::Warn, enforced: SldMode::Warn };
    let limit = PerSecond::new(1).unwrap();
    for own in [Policy::Off, Policy::Warn, Policy::Step, Policy::RateLimit(limit)] {
        let vm = VmPolicy::new(host, Some(own), false).unwrap();
        let (mut task, mut vcpu) = (Task::new(0), Vcpu::new(vm));
        vcpu.load(&mut guard, &mut task).unwrap();
        let kernel_mode = AcContext { cpl: 0, cr0_am: false, eflags_ac: false };
        assert_eq!(vcpu.on_ac(&mut guard, &mut task, kernel_mode), Ok(Verdict::Kill), "{own}");
        assert_eq!(guard.hardware.test_ctrl, BIT);
    }
}
