//! A vCPU's local APIC, in x2APIC mode from the start.
//!
//! Pure: the guest loop tells it of register accesses and of the time, and asks what it may
//! deliver. It has no external pins; what it can raise comes from its timer and from IPIs.
//! Source: SDM volume 3, chapter "Advanced Programmable Interrupt Controller (APIC)", section
//! "Extended xAPIC (x2APIC)".

/// The first x2APIC MSR: register 0.
pub const X2APIC_BASE: u32 = 0x800;
/// How many MSRs the range has.
pub const X2APIC_REGISTERS: u32 = 0x40;

/// Registers: the MSR's number less [`X2APIC_BASE`].
pub mod register {
    /// Local APIC ID.
    pub const ID: u32 = 0x02;
    /// Version.
    pub const VERSION: u32 = 0x03;
    /// Task priority.
    pub const TPR: u32 = 0x08;
    /// Processor priority.
    pub const PPR: u32 = 0x0a;
    /// End of interrupt.
    pub const EOI: u32 = 0x0b;
    /// Logical destination.
    pub const LDR: u32 = 0x0d;
    /// Spurious interrupt vector.
    pub const SVR: u32 = 0x0f;
    /// In-service, 8 registers.
    pub const ISR: u32 = 0x10;
    /// Trigger mode, 8 registers.
    pub const TMR: u32 = 0x18;
    /// Interrupt request, 8 registers.
    pub const IRR: u32 = 0x20;
    /// Error status.
    pub const ESR: u32 = 0x28;
    /// Interrupt command, 64 bits.
    pub const ICR: u32 = 0x30;
    /// LVT timer.
    pub const LVT_TIMER: u32 = 0x32;
    /// LVT thermal sensor, the first of five that do nothing here.
    pub const LVT_THERMAL: u32 = 0x33;
    /// LVT error, the last of them.
    pub const LVT_ERROR: u32 = 0x37;
    /// Timer: initial count.
    pub const INITIAL_COUNT: u32 = 0x38;
    /// Timer: current count.
    pub const CURRENT_COUNT: u32 = 0x39;
    /// Timer: divide configuration.
    pub const DIVIDE: u32 = 0x3e;
    /// Self IPI.
    pub const SELF_IPI: u32 = 0x3f;
}

/// SVR bit 8: the APIC is enabled by software.
const SVR_ENABLED: u32 = 1 << 8;
/// LVT timer bit 18: TSC-deadline mode.
const LVT_TSC_DEADLINE: u32 = 1 << 18;
/// LVT bit 16: masked.
const LVT_MASKED: u32 = 1 << 16;
/// Version 0x14, seven LVT entries (highest index 6).
const VERSION: u64 = 0x0006_0014;
/// The timer's shortest time in one-shot and periodic mode, in ticks of the TSC.
const MIN_PERIOD: u64 = 1000;
/// Vectors below this are reserved.
const FIRST_VECTOR: u8 = 16;

/// A write to a reserved bit or to a register that does not take one: #GP(0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gp;

/// What a register write asks of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Command {
    /// Nothing.
    Done,
    /// Send this interprocessor interrupt: the value of ICR.
    Ipi(Ipi),
}

/// An interrupt command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipi(pub u64);

/// How an interprocessor interrupt arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// The vector is raised.
    Fixed(u8),
    /// An NMI.
    Nmi,
    /// INIT: the vCPU is reset and waits for its start.
    Init,
    /// A start-up IPI (SIPI): a vCPU that waits for it starts at the page of this number.
    Startup(u8),
    /// Nothing: SMI, INIT level de-assert, and what is reserved.
    Other,
}

impl Ipi {
    /// Bits 10:8, with the vector.
    ///
    /// INIT and SIPI are not for shorthands that mean the sender too: section "Interrupt Command
    /// Register (ICR)", table of valid combinations. INIT with level 0 (bit 14) and trigger mode
    /// level (bit 15) is a de-assert, which x2APIC mode does not have.
    pub const fn delivery(self) -> Delivery {
        let to_others = matches!(self.shorthand(), 0 | 3);
        match (self.0 >> 8) & 7 {
            0 | 1 => Delivery::Fixed(self.0 as u8),
            4 => Delivery::Nmi,
            5 if to_others && (self.0 >> 14) & 3 != 2 => Delivery::Init,
            6 if to_others => Delivery::Startup(self.0 as u8),
            _ => Delivery::Other,
        }
    }

    /// Bits 19:18: 0 none, 1 self, 2 all including self, 3 all excluding self.
    const fn shorthand(self) -> u64 {
        (self.0 >> 18) & 3
    }

    /// Whether the APIC with this ID is meant: by shorthand (bits 19:18), or by destination (bits
    /// 63:32), physical or logical (bit 11).
    pub const fn reaches(self, id: u32, sender: u32) -> bool {
        let destination = (self.0 >> 32) as u32;
        match self.shorthand() {
            1 => id == sender,
            2 => true,
            3 => id != sender,
            _ if destination == u32::MAX => true,
            _ if self.0 & 1 << 11 == 0 => destination == id,
            _ => destination >> 16 == id >> 4 && destination & 1 << (id & 0xf) != 0,
        }
    }
}

/// How the timer counts: LVT timer bits 18:17.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

/// 256 bits, one a vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Vectors([u64; 4]);

impl Vectors {
    fn set(&mut self, vector: u8, on: bool) {
        let bit = 1 << (vector % 64);
        let word = &mut self.0[usize::from(vector / 64)];
        *word = if on { *word | bit } else { *word & !bit };
    }

    #[inline]
    fn highest(&self) -> Option<u8> {
        // As a rule there is none.
        if self.0.iter().fold(0, |any, word| any | word) == 0 {
            return None;
        }
        let (index, word) = self.0.iter().enumerate().rev().find(|(_, word)| **word != 0)?;
        Some((index * 64) as u8 + 63 - word.leading_zeros() as u8)
    }

    /// The 32 bits of register `index`, 0 to 7.
    fn register(&self, index: u32) -> u64 {
        self.0[index as usize / 2] >> (32 * (index % 2)) & 0xffff_ffff
    }
}

/// A local APIC.
///
/// Times are the guest's TSC. The timer's bus clock runs at the TSC's rate, so that one count of
/// the undivided timer is one tick.
#[derive(Debug, Clone)]
pub struct LocalApic {
    id: u32,
    tpr: u8,
    svr: u32,
    irr: Vectors,
    isr: Vectors,
    icr: u64,
    lvt_timer: u32,
    lvt: [u32; 5],
    divide: u32,
    initial_count: u32,
    /// When the timer fires next; `None` when it is not armed.
    deadline: Option<u64>,
}

impl LocalApic {
    /// After RESET, but for x2APIC mode being on.
    pub const fn new(id: u32) -> Self {
        Self {
            id,
            tpr: 0,
            svr: 0xff,
            irr: Vectors([0; 4]),
            isr: Vectors([0; 4]),
            icr: 0,
            lvt_timer: LVT_MASKED,
            lvt: [LVT_MASKED; 5],
            divide: 0,
            initial_count: 0,
            deadline: None,
        }
    }

    /// INIT: as after RESET. What INIT keeps is the ID and x2APIC mode: section "x2APIC State
    /// Transitions".
    pub const fn reset(&mut self) {
        *self = Self::new(self.id);
    }

    /// IA32_APIC_BASE: the default base, x2APIC mode (bits 11 and 10), bootstrap processor (bit 8).
    /// The mode cannot be left: there is no APIC page.
    pub const fn base(&self) -> u64 {
        if self.id == 0 { 0xfee0_0d00 } else { 0xfee0_0c00 }
    }

    /// Its ID.
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// The task priority, as CR8 has it: its upper half.
    pub const fn cr8(&self) -> u64 {
        (self.tpr >> 4) as u64
    }

    /// MOV to CR8.
    ///
    /// # Errors
    ///
    /// More than four bits.
    pub fn set_cr8(&mut self, value: u64) -> Result<(), Gp> {
        self.tpr = u8::try_from(value).ok().filter(|value| *value < 16).ok_or(Gp)? << 4;
        Ok(())
    }

    /// RDMSR of a register at the time `now`; `None` is #GP(0).
    pub fn read(&self, register: u32, now: u64) -> Option<u64> {
        Some(match register {
            register::ID => self.id.into(),
            register::VERSION => VERSION,
            register::TPR => self.tpr.into(),
            register::PPR => self.ppr().into(),
            // Cluster and bit within it: section "Logical Destination Mode in x2APIC Mode".
            register::LDR => u64::from(self.id >> 4) << 16 | 1 << (self.id & 0xf),
            register::SVR => self.svr.into(),
            register::ISR..register::TMR => self.isr.register(register - register::ISR),
            // Nothing is level-triggered, and nothing goes wrong.
            register::TMR..register::IRR | register::ESR => 0,
            register::IRR..register::ESR => self.irr.register(register - register::IRR),
            register::ICR => self.icr,
            register::LVT_TIMER => self.lvt_timer.into(),
            register::LVT_THERMAL..=register::LVT_ERROR => {
                self.lvt[(register - register::LVT_THERMAL) as usize].into()
            }
            register::INITIAL_COUNT => self.initial_count.into(),
            register::CURRENT_COUNT => self.current_count(now),
            register::DIVIDE => self.divide.into(),
            _ => return None,
        })
    }

    /// WRMSR of a register at the time `now`.
    ///
    /// # Errors
    ///
    /// [`Gp`]; nothing has changed.
    pub fn write(&mut self, register: u32, value: u64, now: u64) -> Result<Command, Gp> {
        // What was due is due under the settings that it was armed with.
        self.tick(now);
        let bits =
            |valid: u32| u32::try_from(value).ok().filter(|value| value & !valid == 0).ok_or(Gp);
        match register {
            register::TPR => self.tpr = bits(0xff)? as u8,
            register::EOI => {
                bits(0)?;
                if let Some(vector) = self.isr.highest() {
                    self.isr.set(vector, false);
                }
            }
            register::SVR => {
                self.svr = bits(0x1ff)?;
                self.lvt_timer |= self.forced_mask();
                let mask = self.forced_mask();
                self.lvt.iter_mut().for_each(|entry| *entry |= mask);
            }
            register::ESR => {
                bits(0)?;
            }
            register::ICR => {
                // Vector, mode, destination mode, level, trigger, shorthand, destination.
                if value & !0xffff_ffff_000c_cfff != 0 {
                    return Err(Gp);
                }
                self.icr = value;
                return Ok(Command::Ipi(Ipi(value)));
            }
            register::LVT_TIMER => {
                let value = bits(0x0007_00ff)? | self.forced_mask();
                let before = core::mem::replace(&mut self.lvt_timer, value);
                // Into or out of TSC-deadline mode: what was armed means nothing any more.
                if (before ^ value) & LVT_TSC_DEADLINE != 0 {
                    self.deadline = None;
                }
            }
            register::LVT_THERMAL..=register::LVT_ERROR => {
                let value = bits(0x0001_a7ff)? | self.forced_mask();
                self.lvt[(register - register::LVT_THERMAL) as usize] = value;
            }
            register::INITIAL_COUNT => {
                self.initial_count = bits(u32::MAX)?;
                if self.mode() != TimerMode::TscDeadline {
                    let armed = self.initial_count != 0;
                    self.deadline = armed.then(|| now.wrapping_add(self.period()));
                }
            }
            register::DIVIDE => self.divide = bits(0xb)?,
            register::SELF_IPI => {
                let vector = bits(0xff)? as u8;
                self.raise(vector);
            }
            _ => return Err(Gp),
        }
        Ok(Command::Done)
    }

    /// While software has disabled the APIC, all LVT entries are masked and stay so: section
    /// "Local APIC State After It Has Been Software Disabled".
    const fn forced_mask(&self) -> u32 {
        if self.svr & SVR_ENABLED == 0 { LVT_MASKED } else { 0 }
    }

    /// IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&self) -> u64 {
        match self.mode() {
            TimerMode::TscDeadline => self.deadline.unwrap_or(0),
            _ => 0,
        }
    }

    /// WRMSR of IA32_TSC_DEADLINE: ignored in the timer's other modes, 0 disarms.
    pub fn set_tsc_deadline(&mut self, value: u64) {
        if self.mode() == TimerMode::TscDeadline {
            self.deadline = (value != 0).then_some(value);
        }
    }

    const fn mode(&self) -> TimerMode {
        match (self.lvt_timer >> 17) & 3 {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            2 => TimerMode::TscDeadline,
            _ => TimerMode::Reserved,
        }
    }

    /// Ticks that one count takes: divide configuration bits 3, 1, 0; 7 is "by 1".
    const fn divisor(&self) -> u64 {
        let code = (self.divide >> 1 & 4) | (self.divide & 3);
        if code == 7 { 1 } else { 2 << code }
    }

    /// No shorter than what leaves the guest time for anything else.
    const fn period(&self) -> u64 {
        let period = self.initial_count as u64 * self.divisor();
        if period < MIN_PERIOD { MIN_PERIOD } else { period }
    }

    fn current_count(&self, now: u64) -> u64 {
        match (self.mode(), self.deadline) {
            (TimerMode::TscDeadline, _) | (_, None) => 0,
            (_, Some(deadline)) => deadline.saturating_sub(now).div_ceil(self.divisor()),
        }
    }

    /// When the timer raises an interrupt next: never while it is masked.
    pub const fn wakes_at(&self) -> Option<u64> {
        if self.lvt_timer & LVT_MASKED == 0 { self.deadline } else { None }
    }

    /// The guest has moved its clock by so much. A count goes on as it was; a deadline is a time of
    /// that clock, and stays.
    pub fn clock_moved(&mut self, by: u64) {
        if self.mode() != TimerMode::TscDeadline {
            self.deadline = self.deadline.map(|deadline| deadline.wrapping_add(by));
        }
    }

    /// It is `now`: the timer fires if it is due. Periods that were missed are not made up for.
    pub fn tick(&mut self, now: u64) {
        let Some(deadline) = self.deadline.filter(|deadline| *deadline <= now) else { return };
        self.deadline = match self.mode() {
            TimerMode::Periodic if self.initial_count != 0 => {
                let behind = (now - deadline) % self.period();
                Some((now - behind).wrapping_add(self.period()))
            }
            _ => None,
        };
        if self.lvt_timer & LVT_MASKED == 0 {
            self.raise(self.lvt_timer as u8);
        }
    }

    /// Requests an interrupt. Reserved vectors, and all while software has not enabled the APIC,
    /// are dropped.
    pub fn raise(&mut self, vector: u8) {
        if vector >= FIRST_VECTOR && self.svr & SVR_ENABLED != 0 {
            self.irr.set(vector, true);
        }
    }

    /// [`Self::raise`] for each vector whose bit is set.
    pub fn raise_all(&mut self, vectors: [u64; 4]) {
        if self.svr & SVR_ENABLED == 0 {
            return;
        }
        let mut valid = [u64::MAX; 4];
        valid[0] <<= FIRST_VECTOR;
        for ((word, vectors), valid) in self.irr.0.iter_mut().zip(vectors).zip(valid) {
            *word |= vectors & valid;
        }
    }

    /// Processor priority: the higher one of task priority and what is in service.
    fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr >> 4 >= in_service >> 4 { self.tpr } else { in_service }
    }

    /// The interrupt that the CPU would take, if it takes any.
    #[inline]
    pub fn deliverable(&self) -> Option<u8> {
        self.irr.highest().filter(|vector| vector >> 4 > self.ppr() >> 4)
    }

    /// The CPU takes it: from requested to in service.
    pub fn acknowledge(&mut self, vector: u8) {
        self.irr.set(vector, false);
        self.isr.set(vector, true);
    }

    /// Its delivery was interrupted, and it is to be delivered again later: back to requested.
    pub fn unacknowledge(&mut self, vector: u8) {
        self.isr.set(vector, false);
        self.irr.set(vector, true);
    }
}

#[cfg(test)]
mod tests {
    use super::register::*;
    use super::*;

    fn enabled() -> LocalApic {
        let mut apic = LocalApic::new(0);
        assert_eq!(apic.write(SVR, 0x1ff, 0), Ok(Command::Done));
        apic
    }

    #[test]
    fn priorities_decide_what_is_delivered() {
        let mut apic = enabled();
        apic.raise(0x31);
        apic.raise(0x45);
        assert_eq!(apic.deliverable(), Some(0x45));
        apic.acknowledge(0x45);
        assert_eq!((apic.deliverable(), apic.read(PPR, 0)), (None, Some(0x40)));
        apic.raise(0x4f);
        assert_eq!(apic.deliverable(), None, "the same class waits");
        apic.raise(0x50);
        assert_eq!(apic.deliverable(), Some(0x50));
        apic.acknowledge(0x50);
        for expected in [None, Some(0x4f)] {
            assert_eq!(apic.write(EOI, 0, 0), Ok(Command::Done));
            assert_eq!(apic.deliverable(), expected);
        }
        apic.set_cr8(4).unwrap();
        assert_eq!((apic.deliverable(), apic.cr8()), (None, 4));
        apic.set_cr8(2).unwrap();
        assert_eq!(apic.deliverable(), Some(0x4f));
        assert_eq!((apic.set_cr8(16), apic.set_cr8(0x102)), (Err(Gp), Err(Gp)));
    }

    #[test]
    fn what_was_taken_and_not_delivered_is_requested_again() {
        let mut apic = enabled();
        apic.raise(0xff);
        apic.acknowledge(0xff);
        apic.unacknowledge(0xff);
        assert_eq!(apic.deliverable(), Some(0xff));
        assert_eq!((apic.read(IRR + 7, 0), apic.read(ISR + 7, 0)), (Some(1 << 31), Some(0)));
    }

    #[test]
    fn a_disabled_apic_and_reserved_vectors_raise_nothing() {
        let mut apic = LocalApic::new(0);
        apic.raise(0x40);
        assert_eq!(apic.deliverable(), None);
        let mut apic = enabled();
        apic.raise(15);
        assert_eq!(apic.deliverable(), None);
    }

    #[test]
    fn the_timer_in_its_modes() {
        let mut apic = enabled();
        let set = |apic: &mut LocalApic, register, value, now| {
            assert_eq!(apic.write(register, value, now), Ok(Command::Done));
        };
        set(&mut apic, DIVIDE, 0, 0);
        set(&mut apic, LVT_TIMER, 0x40, 0);
        set(&mut apic, INITIAL_COUNT, 1000, 1000);
        assert_eq!((apic.wakes_at(), apic.read(CURRENT_COUNT, 2000)), (Some(3000), Some(500)));
        apic.clock_moved(50);
        apic.tick(3049);
        assert_eq!(apic.deliverable(), None);
        apic.tick(3050);
        assert_eq!((apic.deliverable(), apic.wakes_at()), (Some(0x40), None));

        set(&mut apic, LVT_TIMER, 0x2_0041, 0);
        set(&mut apic, DIVIDE, 0xb, 0);
        set(&mut apic, INITIAL_COUNT, 2000, 0);
        apic.tick(5000);
        assert_eq!((apic.deliverable(), apic.wakes_at()), (Some(0x41), Some(6000)));
        set(&mut apic, INITIAL_COUNT, 1, 0);
        assert_eq!(apic.wakes_at(), Some(MIN_PERIOD), "no storm");

        set(&mut apic, LVT_TIMER, 0x4_0042, 0);
        assert_eq!(apic.wakes_at(), None, "a new mode disarms");
        set(&mut apic, INITIAL_COUNT, 10, 0);
        assert_eq!(apic.wakes_at(), None);
        apic.set_tsc_deadline(77);
        apic.clock_moved(5);
        assert_eq!((apic.tsc_deadline(), apic.read(CURRENT_COUNT, 0)), (77, Some(0)));
        apic.tick(77);
        assert_eq!((apic.deliverable(), apic.tsc_deadline()), (Some(0x42), 0));
    }

    #[test]
    fn masking_does_not_stop_the_timer_and_disabling_masks() {
        let mut apic = enabled();
        for (register, value) in [(LVT_TIMER, 0x40), (DIVIDE, 0xb), (INITIAL_COUNT, 1000)] {
            assert_eq!(apic.write(register, value, 0), Ok(Command::Done));
        }
        assert_eq!(apic.write(LVT_TIMER, 0x1_0041, 10), Ok(Command::Done));
        assert_eq!((apic.read(CURRENT_COUNT, 10), apic.wakes_at()), (Some(990), None));
        assert_eq!(apic.write(LVT_TIMER, 0x41, 1000), Ok(Command::Done));
        assert_eq!((apic.deliverable(), apic.wakes_at()), (None, None), "it fired masked");
        assert_eq!(apic.write(SVR, 0xff, 0), Ok(Command::Done));
        assert_eq!(apic.read(LVT_TIMER, 0), Some(0x1_0041));
        assert_eq!(apic.write(LVT_ERROR, 0x20, 0), Ok(Command::Done));
        assert_eq!(apic.read(LVT_ERROR, 0), Some(0x1_0020));
    }

    #[test]
    fn commands_reach_whom_they_mean() {
        let mut apic = enabled();
        let command = apic.write(ICR, 3 << 32 | 0x55, 0).unwrap();
        let Command::Ipi(ipi) = command else { panic!("{command:?}") };
        assert_eq!(ipi.delivery(), Delivery::Fixed(0x55));
        assert!(ipi.reaches(3, 0) && !ipi.reaches(0, 0));
        assert_eq!(Ipi(4 << 8).delivery(), Delivery::Nmi);
        let shorthand = |code: u64| Ipi(code << 18);
        assert!(shorthand(1).reaches(2, 2) && !shorthand(1).reaches(1, 2));
        assert!(shorthand(2).reaches(2, 2) && shorthand(2).reaches(1, 2));
        assert!(!shorthand(3).reaches(2, 2) && shorthand(3).reaches(1, 2));
        assert!(Ipi(0xffff_ffff << 32).reaches(9, 0));
        let logical = Ipi(0x1_0006 << 32 | 1 << 11);
        assert!(logical.reaches(0x11, 0) && logical.reaches(0x12, 0) && !logical.reaches(1, 0));
    }

    #[test]
    fn deliveries_by_mode_and_shorthand() {
        const VECTOR: u64 = 0x9a;
        let expected = [
            Delivery::Fixed(0x9a),
            Delivery::Fixed(0x9a),
            Delivery::Other,
            Delivery::Other,
            Delivery::Nmi,
            Delivery::Init,
            Delivery::Startup(0x9a),
            Delivery::Other,
        ];
        for (mode, expected) in (0..).zip(expected) {
            for (level_and_trigger, shorthand) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))) {
                let bits = mode << 8 | level_and_trigger << 14 | shorthand << 18 | VECTOR;
                let to_sender = shorthand == 1 || shorthand == 2;
                let expected = match expected {
                    Delivery::Init if to_sender || level_and_trigger == 2 => Delivery::Other,
                    Delivery::Startup(_) if to_sender => Delivery::Other,
                    other => other,
                };
                assert_eq!(Ipi(bits).delivery(), expected, "{bits:#x}");
            }
        }
        // As kernels start a CPU: INIT assert, INIT de-assert, SIPI.
        let sequence = [0xc500, 0x8500, 0x4608].map(|bits| Ipi(1 << 32 | bits).delivery());
        assert_eq!(sequence, [Delivery::Init, Delivery::Other, Delivery::Startup(8)]);
    }

    #[test]
    fn many_vectors_are_raised_as_each_alone() {
        let vectors = [u64::MAX, 1 << 63, 0, 0x8000_0000_0000_0001];
        for mut apic in [enabled(), LocalApic::new(0)] {
            apic.raise(0x50);
            let mut one_by_one = apic.clone();
            apic.raise_all(vectors);
            for vector in 0..=u8::MAX {
                if vectors[usize::from(vector / 64)] & 1 << (vector % 64) != 0 {
                    one_by_one.raise(vector);
                }
            }
            assert_eq!(apic.irr, one_by_one.irr);
        }
    }

    #[test]
    fn init_leaves_the_id_alone() {
        let mut apic = LocalApic::new(0x15);
        for (register, value) in [
            (SVR, 0x1ff),
            (TPR, 0x20),
            (DIVIDE, 0xb),
            (LVT_TIMER, 0x2_0041),
            (INITIAL_COUNT, 5000),
            (LVT_ERROR, 0x30),
        ] {
            assert_eq!(apic.write(register, value, 0), Ok(Command::Done));
        }
        let _ = apic.write(ICR, 0x4_0055, 0).unwrap();
        apic.raise_all([0, 6, 0, 0]);
        apic.acknowledge(0x41);
        apic.reset();
        let fresh = LocalApic::new(0x15);
        for register in 0..X2APIC_REGISTERS {
            assert_eq!(apic.read(register, 1), fresh.read(register, 1), "{register:#x}");
        }
        assert_eq!((apic.read(ID, 0), apic.read(SVR, 0)), (Some(0x15), Some(0xff)));
        assert_eq!((apic.wakes_at(), apic.tsc_deadline()), (None, 0));
        apic.tick(u64::MAX);
        assert_eq!(apic.deliverable(), None);
    }

    #[test]
    fn reserved_bits_fault_and_nothing_else_panics() {
        for register in 0..X2APIC_REGISTERS {
            for value in [0, 1, 0xff, 0x1ff, 1 << 12, 1 << 20, u64::from(u32::MAX), u64::MAX] {
                let mut apic = enabled();
                let before = apic.clone().read(register, 0);
                if apic.write(register, value, 0).is_err() {
                    assert_eq!(apic.read(register, 0), before);
                }
                let _ = (apic.deliverable(), apic.tick(u64::MAX));
            }
        }
        let mut apic = enabled();
        assert_eq!(apic.write(TPR, 0x100, 0), Err(Gp));
        assert_eq!(apic.write(EOI, 1, 0), Err(Gp));
        assert_eq!(apic.write(ID, 0, 0), Err(Gp));
        assert_eq!((apic.read(EOI, 0), apic.read(SELF_IPI, 0)), (None, None));
    }
}
