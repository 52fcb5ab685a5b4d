//! Shows that the exhaustive checks have teeth: this crate is built again and again with a fault
//! seeded in its source, and `check::explore`, or the check of the rate limiter, must find each.
//!
//! The faults are textual changes, so that what ships needs no hooks for them. One whose text is
//! not found exactly once, or that does not compile, fails the test like one that survives.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

/// One seeded fault.
struct Mutant {
    fault: &'static str,
    /// The test that finds it.
    found_by: &'static str,
    file: &'static str,
    /// What is replaced by what.
    edits: &'static [(&'static str, &'static str)],
}

const fn mutant(
    file: &'static str,
    found_by: &'static str,
    fault: &'static str,
    edits: &'static [(&'static str, &'static str)],
) -> Mutant {
    Mutant { fault, found_by, file, edits }
}

const ONE_CPU: &str = "check::explore::one_cpu";
const OFF_FATAL: &str = "check::explore::one_cpu_off_or_fatal";
const POLICIES: &str = "check::explore::one_cpu_any_policy";
const ICE_LAKE: &str = "check::explore::one_cpu_that_does_not_enumerate";
const THREADS: &str = "check::explore::two_threads_of_a_core";
const THREADS_POLICIES: &str = "check::explore::two_threads_of_a_core_any_policy";
const TWO_CPUS: &str = "check::explore::two_cpus";
const ODD: &str = "check::explore::hardware_that_lacks_or_fails";
const RATE: &str = "rate::tests::every_short_sequence";

#[rustfmt::skip]
const MUTANTS: &[Mutant] = &[
    // Boot and end of a CPU.
    mutant("cpu.rs", ONE_CPU, "boot clears the platform's bits",
        &[("first, found, cpu.platform_bits | bit(next.on))", "first, found, bit(next.on))")]),
    mutant("cpu.rs", ONE_CPU, "later writes clear the platform's bits",
        &[("write_test_ctrl(self.cpu.platform_bits | bit(next.on))", "write_test_ctrl(bit(next.on))")]),
    mutant("cpu.rs", OFF_FATAL, "off leaves the firmware's bit on",
        &[("SldMode::Off => false", "SldMode::Off => core.on")]),
    mutant("cpu.rs", OFF_FATAL, "fatal leaves the firmware's bit off",
        &[("SldMode::Fatal => true", "SldMode::Fatal => core.on")]),
    mutant("cpu.rs", ONE_CPU, "the bit is not verified at boot",
        &[("    if toggle {", "    if false && toggle {")]),
    mutant("cpu.rs", ODD, "what was written is not read back",
        &[("Ok(read) if read == value => Ok(())", "Ok(_) => Ok(())")]),
    mutant("cpu.rs", ODD, "a failed probe is ignored",
        &[("        return Err(failure);\n", "        let _ = failure;\n")]),
    mutant("hardware.rs", ODD, "a model that is not on the list is touched",
        &[("family == 6 && MODELS_NOT_ENUMERATING.contains(&model)", "family == 6 || model == 0")]),
    mutant("cpu.rs", ONE_CPU, "the boot value is not restored",
        &[("if core.online == 0 { core.boot_on } else { wanted(core, mode) }", "wanted(core, mode)")]),
    mutant("cpu.rs", THREADS, "the boot value is restored under a sibling",
        &[("if core.online == 0 { core.boot_on } else { wanted(core, mode) }", "core.boot_on")]),
    mutant("cpu.rs", THREADS, "a thread that went offline still counts",
        &[("            core.online -= 1;\n", "")]),
    mutant("cpu.rs", THREADS, "the flag of a thread that went offline still counts",
        &[("            core.disabled -= u8::from(disabled);\n", "            let _ = disabled;\n")]),
    mutant("cpu.rs", THREADS, "a sibling is probed by toggling",
        &[("bring_to(hardware, first, found", "bring_to(hardware, true, found")]),
    mutant("cpu.rs", THREADS, "a sibling comes online without detection",
        &[("next.on = wanted(&next, mode);", "next.on = if first { wanted(&next, mode) } else { core.on };")]),

    // Task switch.
    mutant("cpu.rs", ONE_CPU, "the task switch does nothing",
        &[("this.run_with(next.disabled, Why::TaskSwitch)", "Ok(None)")]),
    mutant("cpu.rs", ONE_CPU, "the task switch does not compare",
        &[(" && this.cpu.disabled != next.disabled", "")]),
    mutant("cpu.rs", ONE_CPU, "the task switch takes the flag for its opposite",
        &[("this.cpu.disabled != next.disabled", "this.cpu.disabled == next.disabled"),
          ("this.run_with(next.disabled,", "this.run_with(!next.disabled,")]),

    // Flag and bit.
    mutant("vcpu.rs", ONE_CPU, "flag set without the MSR",
        &[("let written = self.run_with(disabled, why)?;", "let (written, _) = (None, why);")]),
    mutant("vcpu.rs", ONE_CPU, "MSR written without the flag",
        &[("        task.disabled = disabled;\n", "")]),
    mutant("cpu.rs", ONE_CPU, "polarity of the bit swapped",
        &[("if on { TEST_CTRL_SPLIT_LOCK } else { 0 }", "if on { 0 } else { TEST_CTRL_SPLIT_LOCK }")]),
    mutant("vcpu.rs", ONE_CPU, "polarity swapped between wish and flag",
        &[("task.disabled == on {", "task.disabled != on {"),
          ("this.set_disabled(task, !on, why)", "this.set_disabled(task, on, why)")]),
    mutant("cpu.rs", ONE_CPU, "WRMSR of the value that is there",
        &[("if next.on == core.on {", "if false {")]),

    // Siblings.
    mutant("cpu.rs", THREADS, "sibling overwritten",
        &[("wanted(core, SldMode::Warn)", "!disabled")]),
    mutant("cpu.rs", THREADS, "off as soon as one thread wants it off",
        &[("core.disabled < core.online", "core.disabled == 0")]),
    mutant("cpu.rs", THREADS, "with siblings always on",
        &[("core.disabled < core.online", "core.disabled < core.online || core.online > 1")]),
    mutant("cpu.rs", ONE_CPU, "MSR written outside of the critical section",
        &[("let mut core = self.core.lock();", "let core = *self.core.lock();"),
          ("let mut next = *core;", "let mut next = core;"),
          ("        *core = next;\n        Ok(written)", "        *self.core.lock() = next;\n        Ok(written)")]),

    // A step.
    mutant("cpu.rs", THREADS, "a step leaves the bit on",
        &[("core.disabled < core.online && !core.stepping", "core.disabled < core.online")]),
    mutant("cpu.rs", THREADS, "what a sibling runs ends the step",
        &[("wanted(core, SldMode::Warn)", "wanted(&CoreState { stepping: false, ..*core }, SldMode::Warn)")]),
    mutant("cpu.rs", THREADS, "a sibling that comes online ends the step",
        &[("next.on = wanted(&next, mode);", "next.on = wanted(&CoreState { stepping: false, ..next }, mode);")]),
    mutant("cpu.rs", THREADS, "a sibling that goes offline ends the step",
        &[("core.boot_on } else { wanted(core, mode) }",
           "core.boot_on } else { wanted(&CoreState { stepping: false, ..*core }, mode) }")]),
    mutant("cpu.rs", THREADS, "what siblings do during a step is not counted",
        &[("    fn settle(&mut self, why: Why, change: impl FnOnce(&mut CoreState) -> bool) -> Written {\n",
           "    fn settle(&mut self, why: Why, change: impl FnOnce(&mut CoreState) -> bool) -> Written {
        if why != Why::Step && self.core.lock().stepping {
            return Ok(None);
        }\n")]),
    mutant("cpu.rs", THREADS, "the step's end does not restore the bit",
        &[("        core.stepping = stepping;\n        wanted(core, mode)",
           "        core.stepping = stepping;\n        core.on && wanted(core, mode)")]),
    mutant("cpu.rs", THREADS, "the step's end switches detection on, whatever is wanted",
        &[("        core.stepping = stepping;\n        wanted(core, mode)",
           "        core.stepping = stepping;\n        !stepping")]),
    mutant("cpu.rs", THREADS, "the step does not end",
        &[("core.stepping = stepping;", "core.stepping |= stepping;")]),
    mutant("cpu.rs", OFF_FATAL, "a step where the host is fatal",
        &[("    if mode != SldMode::Warn {\n", "    if mode == SldMode::Off {\n"),
          ("SldMode::Fatal => true,", "SldMode::Fatal => !core.stepping,")]),
    mutant("cpu.rs", ODD, "a step where detection is absent",
        &[("    if mode != SldMode::Warn {\n", "    if mode == SldMode::Fatal {\n"),
          ("SldMode::Off => false,", "SldMode::Off => core.stepping,")]),
    mutant("vcpu.rs", THREADS, "resumed because a sibling steps with the bit off",
        &[("(already && !self.core.has_siblings())", "(already && !self.core.has_siblings()) || (!already && !self.core.lock().on)")]),

    // Verify.
    mutant("verify.rs", ONE_CPU, "verify does not compare the flags",
        &[("if cpu.disabled != flag {", "if false {")]),
    mutant("verify.rs", ODD, "verify expects the flag where it says nothing",
        &[("let flag = cpu.mode == SldMode::Warn && task.disabled;", "let flag = task.disabled;")]),
    mutant("verify.rs", ODD, "verify reads where detection is absent",
        &[("if cpu.test_ctrl != Presence::Works {", "if false {")]),
    mutant("verify.rs", ONE_CPU, "verify reads outside of the critical section",
        &[("let core = core.lock();", "let core = *core.lock();")]),
    mutant("verify.rs", ONE_CPU, "verify compares bit 29 alone",
        &[("Ok(found) if found == expected => {}", "Ok(found) if (found ^ expected) & bit(true) == 0 => {}")]),
    mutant("verify.rs", ONE_CPU, "verify does not compare bit 29",
        &[("Ok(found) if found == expected => {}", "Ok(found) if (found ^ expected) & !bit(true) == 0 => {}")]),
    mutant("verify.rs", ONE_CPU, "verify takes an MSR that faults",
        &[("Err(MsrFault) => return Err(Violation::Unreadable { expected }),", "Err(MsrFault) => {}")]),
    mutant("verify.rs", ONE_CPU, "verify believes what the core says of the bit",
        &[("if core.on != expected {", "if false {")]),
    mutant("verify.rs", THREADS, "verify takes no notice of the step",
        &[("let expected = wanted(&core, cpu.mode);", "let expected = core.on && core.stepping || wanted(&core, cpu.mode);")]),
    mutant("verify.rs", THREADS, "verify holds the step for a fault",
        &[(" && !core.stepping", "")]),
    mutant("verify.rs", ONE_CPU, "verify believes the core's counts",
        &[(" && core.on == flag {", " && false {")]),
    mutant("verify.rs", THREADS, "verify believes the core's counts with siblings",
        &[("core.online > 1 && flag;", "core.online > 1;")]),
    mutant("verify.rs", THREADS, "verify denies siblings their say",
        &[("core.online > 1 && flag;", "false;")]),
    mutant("verify.rs", ONE_CPU, "verify writes what it expects",
        &[("        Ok(found) => return Err(Violation::TestCtrl { expected, found }),",
           "        Ok(_) => hardware.write_test_ctrl(expected).unwrap(),")]),

    // Load and put.
    mutant("vcpu.rs", ONE_CPU, "load without effect",
        &[("self.update(guard, task, self.wants_on(), Why::Load)", "self.update(guard, task, !task.disabled, Why::Load)")]),
    mutant("vcpu.rs", ONE_CPU, "write on every load",
        &[("        self.loaded = Some(task.id);\n",
           "        self.loaded = Some(task.id);
            let this = guard.this_cpu();
            let _core = this.core.lock();
            if let Ok(value) = this.hardware.read_test_ctrl() {
                this.hardware.write_test_ctrl(value)?;
            }
            drop(_core);\n")]),
    mutant("vcpu.rs", ONE_CPU, "load does not save the flag",
        &[("            self.host_sld_disabled = task.disabled;\n", "")]),
    mutant("vcpu.rs", ONE_CPU, "a repeated load saves the guest's flag",
        &[("if self.loaded.is_none() {\n            self.host", "if true {\n            self.host")]),
    mutant("vcpu.rs", ONE_CPU, "put without restore",
        &[("self.update(guard, task, !self.host_sld_disabled, Why::Put)?", "None; let _ = (guard, task)")]),
    mutant("vcpu.rs", ONE_CPU, "put restores the opposite",
        &[("!self.host_sld_disabled, Why::Put", "self.host_sld_disabled, Why::Put")]),
    mutant("vcpu.rs", ONE_CPU, "put switches detection on, whatever it was",
        &[("!self.host_sld_disabled, Why::Put", "true, Why::Put")]),
    mutant("vcpu.rs", ONE_CPU, "put leaves the vCPU loaded",
        &[("        self.loaded = None;\n", "")]),

    // Modes and policies.
    mutant("vcpu.rs", OFF_FATAL, "fatal propagated",
        &[("this.cpu.mode == SldMode::Warn && self.has_say()", "this.cpu.mode != SldMode::Off && self.has_say()"),
          ("    const fn wants_on(&self) -> bool {\n        self.vm.policy().sees_all() || self.virtual_bit()",
           "    const fn wants_on(&self) -> bool {\n        self.virtual_bit()")]),
    mutant("vcpu.rs", ODD, "propagated where detection is absent",
        &[("this.cpu.mode == SldMode::Warn && self.has_say()", "this.cpu.mode != SldMode::Fatal && self.has_say()")]),
    mutant("vcpu.rs", POLICIES, "propagated where the policy wants all seen",
        &[("self.vm.policy().sees_all() || self.virtual_bit()", "self.virtual_bit()")]),
    mutant("vcpu.rs", ONE_CPU, "a policy that wants all seen loaded without detection",
        &[("self.vm.policy().sees_all() || self.vm.exposed", "self.vm.exposed")]),
    mutant("vcpu.rs", ONE_CPU, "an unaware guest's zero taken for a wish",
        &[("self.vm.policy().sees_all() || self.vm.exposed", "true")]),
    mutant("policy.rs", POLICIES, "off wants all seen",
        &[("Self::Off | Self::Warn => false,", "Self::Off => true,\n            Self::Warn => false,")]),
    mutant("policy.rs", ONE_CPU, "warn wants all seen",
        &[("Self::Off | Self::Warn => false,", "Self::Warn => true,\n            Self::Off => false,")]),
    mutant("policy.rs", POLICIES, "step does not see all",
        &[("Self::Step | Self::Emulate | Self::RateLimit(_) | Self::Fatal => true,",
           "Self::Step => false,\n            Self::Emulate | Self::RateLimit(_) | Self::Fatal => true,")]),
    mutant("policy.rs", POLICIES, "emulate does not see all",
        &[("Self::Step | Self::Emulate | Self::RateLimit(_) | Self::Fatal => true,",
           "Self::Emulate => false,\n            Self::Step | Self::RateLimit(_) | Self::Fatal => true,")]),
    mutant("policy.rs", POLICIES, "a rate limit does not see all",
        &[("Self::Step | Self::Emulate | Self::RateLimit(_) | Self::Fatal => true,",
           "Self::RateLimit(_) => false,\n            Self::Step | Self::Emulate | Self::Fatal => true,")]),
    mutant("policy.rs", POLICIES, "fatal does not see all",
        &[("Self::Step | Self::Emulate | Self::RateLimit(_) | Self::Fatal => true,",
           "Self::Fatal => false,\n            Self::Step | Self::Emulate | Self::RateLimit(_) => true,")]),
    mutant("policy.rs", OFF_FATAL, "a policy in a host that is off",
        &[("SldMode::Off => matches!(self, Self::Off),", "SldMode::Off => matches!(self, Self::Off | Self::Warn),")]),
    mutant("policy.rs", OFF_FATAL, "nothing is kept in a host that is off",
        &[("SldMode::Off => matches!(self, Self::Off),", "SldMode::Off => matches!(self, Self::Fatal),")]),
    mutant("policy.rs", POLICIES, "off refused in a host that warns",
        &[("SldMode::Warn => true,", "SldMode::Warn => !matches!(self, Self::Off),")]),
    mutant("policy.rs", OFF_FATAL, "a step in a fatal host",
        &[("matches!(self, Self::Emulate | Self::Fatal)", "matches!(self, Self::Emulate | Self::Fatal | Self::Step)")]),
    mutant("policy.rs", OFF_FATAL, "a fatal host does not emulate",
        &[("matches!(self, Self::Emulate | Self::Fatal)", "matches!(self, Self::Fatal)")]),
    mutant("mode.rs", OFF_FATAL, "exposed although nothing is enforced",
        &[("expose && enforced != SldMode::Off;", "expose;")]),
    mutant("mode.rs", POLICIES, "a VM gets the host's policy for its own",
        &[("Ok(Self { policy, ..self })", "Ok(self)")]),
    mutant("mode.rs", POLICIES, "the task of a VM that is off has no flag",
        &[("matches!((self.host, self.policy), (SldMode::Warn, Policy::Off))", "false")]),
    mutant("mode.rs", ONE_CPU, "the tasks of all VMs have the flag",
        &[("matches!((self.host, self.policy), (SldMode::Warn, Policy::Off))", "matches!(self.host, SldMode::Warn)")]),
    mutant("mode.rs", OFF_FATAL, "the tasks of a host that is off have the flag",
        &[("matches!((self.host, self.policy), (SldMode::Warn, Policy::Off))", "matches!(self.policy, Policy::Off)")]),
    mutant("vcpu.rs", POLICIES, "a task of a VM that is off is made as any",
        &[("Self { id, disabled: vm.unloaded_flag(), warned: false }", "Self { id, disabled: { let _ = vm; false }, warned: false }")]),

    // A new policy.
    mutant("vcpu.rs", OFF_FATAL, "a policy that the host does not allow is taken",
        &[("let vm = self.vm.with(policy)?;", "let vm = self.vm.with(policy).unwrap_or(self.vm);")]),
    mutant("vcpu.rs", POLICIES, "a new policy is not kept",
        &[(".inspect(|_| *self = next))", ")")]),
    mutant("vcpu.rs", POLICIES, "a new policy is without effect",
        &[("            if task.disabled != disabled {\n", "            if false {\n")]),
    mutant("vcpu.rs", POLICIES, "a new policy's write has another reason",
        &[("this.set_disabled(task, disabled, Why::Policy)?", "this.set_disabled(task, disabled, Why::Load)?")]),
    mutant("vcpu.rs", POLICIES, "a new policy's flag alone",
        &[("written = this.set_disabled(task, disabled, Why::Policy)?;", "task.disabled = disabled;")]),
    mutant("vcpu.rs", POLICIES, "a new policy undoes nothing",
        &[("let disabled = if guests", "let disabled = if !guests { task.disabled } else if guests")]),
    mutant("vcpu.rs", POLICIES, "a new policy ends what the loaded guest wants",
        &[("let guests = self.loaded.is_some() && self.has_say();", "let guests = false;")]),
    mutant("vcpu.rs", POLICIES, "a new policy brings an unloaded guest's wish into force",
        &[("let guests = self.loaded.is_some() && self.has_say();", "let guests = self.has_say();")]),
    mutant("vcpu.rs", POLICIES, "a new policy takes an unaware guest's zero for a wish",
        &[("let guests = self.loaded.is_some() && self.has_say();", "let guests = self.loaded.is_some();")]),
    mutant("vcpu.rs", POLICIES, "put restores what was before the new policy",
        &[("let next = Self { vm, host_sld_disabled: vm.unloaded_flag(), ..*self };", "let next = Self { vm, ..*self };")]),
    mutant("vcpu.rs", POLICIES, "not warned anew after a new policy",
        &[("        task.warned = false;\n", "")]),
    mutant("vcpu.rs", ODD, "a new policy is lost where detection is absent",
        &[("            task.disabled = self.host_sld_disabled;\n", "")]),
    mutant("vcpu.rs", ODD, "a new policy takes the CPU for one that detects",
        &[("        if this.cpu.mode == SldMode::Warn {\n            let guests", "        if true {\n            let guests")]),
    mutant("vcpu.rs", POLICIES, "a new policy forgets that a vCPU is loaded",
        &[("let next = Self { vm, host", "let next = Self { vm, loaded: None, host")]),

    // The virtual MSR.
    mutant("vcpu.rs", ONE_CPU, "reset does not clear",
        &[("        self.msr_test_ctrl = 0;\n        self.propagate", "        self.propagate")]),
    mutant("vcpu.rs", ONE_CPU, "reset clears without effect",
        &[("        self.msr_test_ctrl = 0;\n        self.propagate(guard, task)",
           "        self.msr_test_ctrl = 0;\n        let _ = (guard, task);\n        Ok(None)")]),
    mutant("vcpu.rs", ONE_CPU, "guest write stored without effect",
        &[("Ok(self.propagate(guard, task)?.map_or(MsrWrite::Stored, MsrWrite::Propagated))",
           "let _ = (guard, task);\n        Ok(MsrWrite::Stored)")]),
    mutant("vcpu.rs", ONE_CPU, "guest write propagated and not stored",
        &[("        self.msr_test_ctrl = value;\n        Ok(", "        Ok(")]),
    mutant("vcpu.rs", ONE_CPU, "write propagated though not loaded",
        &[("if self.loaded == Some(task.id) {", "if true {")]),
    mutant("vcpu.rs", TWO_CPUS, "host write propagated where another task runs",
        &[("if self.loaded == Some(task.id) {", "if self.loaded.is_some() {")]),
    mutant("vcpu.rs", ONE_CPU, "reserved bits accepted",
        &[("if value & !valid != 0 {", "if value & !valid & 1 != 0 {")]),
    mutant("vcpu.rs", ONE_CPU, "bit 29 accepted from an unaware guest",
        &[("let valid = if self.vm.exposed { TEST_CTRL_SPLIT_LOCK } else { 0 };", "let valid = TEST_CTRL_SPLIT_LOCK;")]),
    mutant("vcpu.rs", ONE_CPU, "0xCF shown to an unaware guest",
        &[("Msr::CoreCapabilities if self.vm.exposed =>", "Msr::CoreCapabilities if true =>")]),
    mutant("vcpu.rs", ONE_CPU, "0xCF can be written",
        &[("Msr::CoreCapabilities => Ok(MsrWrite::Gp)", "Msr::CoreCapabilities => Ok(MsrWrite::Stored)")]),

    // The verdict.
    mutant("vcpu.rs", ODD, "no inject without the feature",
        &[("this.cpu.test_ctrl == Presence::Absent || ac.legacy()", "ac.legacy()")]),
    mutant("vcpu.rs", ONE_CPU, "legacy #AC withheld from the guest",
        &[("this.cpu.test_ctrl == Presence::Absent || ac.legacy()", "this.cpu.test_ctrl == Presence::Absent"),
          ("ac: AcContext,", "_: AcContext,")]),
    mutant("vcpu.rs", ODD, "bogus #AC let pass",
        &[("        if mode == SldMode::Off {\n            return Ok(Verdict::KillBogus);", "        if false {\n            return Ok(Verdict::KillBogus);")]),
    mutant("vcpu.rs", ODD, "a bogus #AC taken for a split lock",
        &[("return Ok(Verdict::KillBogus)", "return Ok(Verdict::Kill)")]),
    mutant("vcpu.rs", ONE_CPU, "a guest's own split lock withheld",
        &[("if self.vm.exposed && self.virtual_bit() {", "if false {")]),
    mutant("vcpu.rs", ONE_CPU, "injected although the guest's bit is clear",
        &[("if self.vm.exposed && self.virtual_bit() {", "if self.vm.exposed {")]),
    mutant("vcpu.rs", POLICIES, "a fatal VM warned",
        &[("Policy::Fatal => return Ok(Verdict::Kill),", "Policy::Fatal => this.let_pass(task, first)?,")]),
    mutant("vcpu.rs", ONE_CPU, "a VM that warns killed",
        &[("            Policy::Off | Policy::Warn => this.let_pass(task, first)?,",
           "            Policy::Off => this.let_pass(task, first)?,\n            Policy::Warn => return Ok(Verdict::Kill),")]),
    mutant("vcpu.rs", POLICIES, "a VM that is off killed",
        &[("            Policy::Off | Policy::Warn => this.let_pass(task, first)?,",
           "            Policy::Warn => this.let_pass(task, first)?,\n            Policy::Off => return Ok(Verdict::Kill),")]),
    mutant("vcpu.rs", THREADS_POLICIES, "a VM that is off told of",
        &[("!task.warned && policy != Policy::Off", "!task.warned")]),
    mutant("vcpu.rs", POLICIES, "step lets all pass",
        &[("Policy::Step => Verdict::Step { first },", "Policy::Step => this.let_pass(task, first)?,")]),
    mutant("vcpu.rs", POLICIES, "emulate steps",
        &[("Policy::Emulate => Verdict::Emulate {", "Policy::Emulate if mode == SldMode::Warn => Verdict::Step { first },\n            Policy::Emulate => Verdict::Emulate {")]),
    mutant("vcpu.rs", OFF_FATAL, "emulate kills in a fatal host",
        &[("if !policy.is_kept_by(mode) {", "if mode == SldMode::Fatal {")]),
    mutant("vcpu.rs", OFF_FATAL, "what cannot be emulated is stepped in a fatal host",
        &[("if mode == SldMode::Warn { Fallback::Step } else { Fallback::Kill }", "Fallback::Step")]),
    mutant("vcpu.rs", POLICIES, "what cannot be emulated ends a VM of a host that warns",
        &[("if mode == SldMode::Warn { Fallback::Step } else { Fallback::Kill }", "Fallback::Kill")]),
    mutant("vcpu.rs", POLICIES, "a rate limit is no limit",
        &[("Policy::RateLimit(limit) => Verdict::Throttle { first, limit },", "Policy::RateLimit(_) => Verdict::Step { first },")]),
    mutant("vcpu.rs", POLICIES, "another limit than the VM's",
        &[("Verdict::Throttle { first, limit },", "Verdict::Throttle { first, limit: limit.min(crate::PerSecond::new(1).unwrap()) },")]),
    mutant("vcpu.rs", POLICIES, "a step is never the first",
        &[("Verdict::Step { first },\n            Policy::Emulate", "Verdict::Step { first: false },\n            Policy::Emulate")]),
    mutant("vcpu.rs", ONE_CPU, "that it was warned is forgotten",
        &[("        task.warned |= first;\n", "")]),
    mutant("vcpu.rs", ONE_CPU, "warned and resumed with the bit on",
        &[("let real_bit = if already { None } else { self.set_disabled(task, true, Why::Warn)? };", "let real_bit = None;")]),
    mutant("vcpu.rs", ONE_CPU, "warned by the flag alone",
        &[("self.set_disabled(task, true, Why::Warn)?", "{ task.disabled = true; None }")]),
    mutant("vcpu.rs", ONE_CPU, "warned every time",
        &[("let first = !task.warned && policy", "let first = policy")]),
    mutant("vcpu.rs", THREADS, "resumed though a sibling keeps the bit on",
        &[("if real_bit.is_some() || (already && !self.core.has_siblings()) {", "if true {")]),
    mutant("vcpu.rs", THREADS, "resumed though a sibling may bring the bit back forever",
        &[("(already && !self.core.has_siblings())", "already")]),
    mutant("vcpu.rs", ONE_CPU, "a step where nobody else runs",
        &[("(already && !self.core.has_siblings())", "false")]),

    // The rate limiter.
    mutant("rate.rs", RATE, "one more than the limit",
        &[("if limit <= self.count {", "if limit < self.count {"), ("TIMES - limit)", "TIMES - limit - 1)")]),
    mutant("rate.rs", RATE, "one less than the limit",
        &[("let limit = usize::from(limit.get());", "let limit = usize::from(limit.get()) - 1;"),
          ("if limit <= self.count {", "if limit > 0 && limit <= self.count {")]),
    mutant("rate.rs", RATE, "the last second begins with the last split lock",
        &[("TIMES - limit)", "TIMES - 1)")]),
    mutant("rate.rs", RATE, "a second that is too short",
        &[("if now < earliest {", "if now + 1 < earliest {")]),
    mutant("rate.rs", RATE, "a second that is too long",
        &[("if now < earliest {", "if now <= earliest {")]),
    mutant("rate.rs", RATE, "refused until now",
        &[("return Err(earliest);", "return Err(now);")]),
    mutant("rate.rs", RATE, "the refused count",
        &[("                return Err(earliest);",
           "                self.times[self.next] = now;
                self.next = (self.next + 1) % TIMES;
                return Err(earliest);")]),
    mutant("rate.rs", RATE, "a clock that is behind makes room",
        &[("now.max(last)", "now")]),
    mutant("rate.rs", RATE, "a clock that is behind is set right",
        &[("            if now < earliest {", "            let now = now.max(self.times[(self.next + TIMES - 1) % TIMES]);\n            if now < earliest {")]),
    mutant("rate.rs", RATE, "what happened is forgotten",
        &[("TIMES.min(self.count + 1)", "0")]),
    mutant("rate.rs", RATE, "the ring is shorter than it is",
        &[("self.next = (self.next + 1) % TIMES;", "self.next = (self.next + 1) % (TIMES - 1);")]),

    // What the caller is told.
    mutant("cpu.rs", ONE_CPU, "a write is not reported",
        &[("            Some(RealBit { on: next.on, why })", "            let _ = why;\n            None")]),
    mutant("cpu.rs", ONE_CPU, "a write is reported as its opposite",
        &[("Some(RealBit { on: next.on, why })", "Some(RealBit { on: !next.on, why })")]),
    mutant("vcpu.rs", ONE_CPU, "a write is reported with another reason",
        &[("!self.host_sld_disabled, Why::Put", "!self.host_sld_disabled, Why::Load")]),
];

/// How one came out, as a line for people.
struct Outcome {
    ok: bool,
    line: String,
}

#[test]
fn every_seeded_fault_is_caught() {
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sld-mutants");
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::new());
    let control = thread::scope(|scope| {
        for worker in 0..thread::available_parallelism().map_or(1, |n| n.get()) {
            let (next, outcomes, dir) = (&next, &outcomes, tmp.join(worker.to_string()));
            scope.spawn(move || {
                while let Some(mutant) = MUTANTS.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = try_mutant(&dir, mutant);
                    outcomes.lock().unwrap().push(outcome);
                }
            });
        }
        // What is built and run must pass without a fault, or "caught" means nothing.
        build_and_run(&tmp.join("control"), &mutant("lib.rs", ICE_LAKE, "none", &[]))
    });
    assert_eq!(control, Ok(None), "the unchanged source does not pass");

    let outcomes = outcomes.into_inner().unwrap();
    let caught = outcomes.iter().filter(|outcome| outcome.ok).count();
    // Not by println!, which the test harness would swallow.
    let mut out = io::stdout().lock();
    for Outcome { line, .. } in &outcomes {
        let _ = writeln!(out, "{line}");
    }
    let _ = writeln!(out, "mutants: {caught} of {} caught", MUTANTS.len());
    assert_eq!(caught, MUTANTS.len(), "see above");
}

fn try_mutant(dir: &Path, mutant: &Mutant) -> Outcome {
    let Mutant { fault, found_by, .. } = mutant;
    let (ok, line) = match build_and_run(dir, mutant) {
        Ok(Some(invariant)) => (true, format!("caught: {fault} ({found_by}: {invariant})")),
        Ok(None) => (false, format!("SURVIVED: {fault} ({found_by})")),
        Err(why) => (false, format!("USELESS: {fault}: {why}")),
    };
    Outcome { ok, line }
}

/// The invariant that the mutant breaks, `None` if it survives.
fn build_and_run(dir: &Path, mutant: &Mutant) -> Result<Option<String>, String> {
    let program = build(dir, mutant)?;
    let output = run(Command::new(program).args(["--exact", mutant.found_by]))?;
    if output.contains("test result: ok. 1 passed") {
        return Ok(None);
    }
    let broken = output.lines().find_map(|line| line.strip_prefix("broken: "));
    broken.map(|invariant| Some(invariant.to_owned())).ok_or(output)
}

/// Compiles the crate's own tests with the fault in it.
fn build(dir: &Path, mutant: &Mutant) -> Result<PathBuf, String> {
    let src = dir.join("src");
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &src);
    // The check is needed alone, and without crates from elsewhere.
    for unneeded in ["mod probe;\n", "mod sequences;\n", "mod threads;\n"] {
        edit(&src.join("check/mod.rs"), unneeded, "")?;
    }
    for (from, to) in mutant.edits {
        edit(&src.join(mutant.file), from, to)?;
    }
    let program = dir.join("mutant");
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut compile = Command::new(rustc);
    compile
        .args(["--edition=2024", "--test", "--crate-name=sld", "--cap-lints=allow"])
        // Some are found in states that are far away.
        .args(["-Cdebug-assertions=on"])
        // One mutant differs from the last in a few lines.
        .arg(format!("-Cincremental={}", dir.join("incremental").display()))
        .arg(src.join("lib.rs"))
        .arg("-o")
        .arg(&program);
    let _ = fs::remove_file(&program);
    let output = run(&mut compile)?;
    if program.exists() { Ok(program) } else { Err(output) }
}

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

fn edit(file: &Path, from: &str, to: &str) -> Result<(), String> {
    let text = fs::read_to_string(file).unwrap();
    let found = text.matches(from).count();
    if found != 1 {
        return Err(format!("{} has {found} times: {from}", file.display()));
    }
    fs::write(file, text.replace(from, to)).unwrap();
    Ok(())
}

/// All that the command prints; an error if it hangs.
fn run(command: &mut Command) -> Result<String, String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{command:?}: {error}"))?;
    let mut streams: [Box<dyn io::Read + Send>; 2] =
        [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
    thread::scope(|scope| {
        let readers = streams.each_mut().map(|stream| scope.spawn(|| io::read_to_string(stream)));
        let deadline = Instant::now() + Duration::from_secs(300);
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                child.kill().unwrap();
                return Err(format!("{command:?} hangs"));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(readers.map(|reader| reader.join().unwrap().unwrap_or_default()).concat())
    })
}
