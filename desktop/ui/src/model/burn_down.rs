//! An SVG chart of how much of a quota remains over the course of the quota's day or month.

use quota_common::{limit::PolicyName, usage::BurnDown};

use super::{
    markup::{Markup, element},
    text::{countdown, number},
};

/// Returns the horizontal position of a time. The chart is 1000 units wide and 1000 high.
fn x(burn: &BurnDown, at: i64) -> i64 {
    let (start, end) = (millis(burn.starts_at), millis(burn.resets_at));
    ((at - start) * 1000 / (end - start).max(1)).clamp(0, 1000)
}

fn y(burn: &BurnDown, remaining: u64) -> u64 {
    let height = u128::from(remaining) * 1000 / u128::from(burn.limit.max(1));
    1000 - u64::try_from(height).unwrap_or(1000).min(1000)
}

fn millis(at: quota_common::Timestamp) -> i64 {
    at.inner().timestamp_millis()
}

pub const fn name(policy: PolicyName) -> &'static str {
    match policy {
        PolicyName::Rpm => "Rate limit",
        PolicyName::Daily => "Daily quota",
        PolicyName::Monthly => "Monthly quota",
        PolicyName::TenantMonthly => "Organization's monthly quota",
    }
}

/// Returns a chart that compares the remaining quota with an even pace, and projects the remaining quota until the
/// reset.
pub fn burn_down_chart(burn: &BurnDown) -> Markup {
    let line = |of: &dyn Fn(usize) -> u64| {
        let points = burn.points.iter().enumerate();
        let points: Vec<String> = points
            .map(|(at, point)| format!("{},{}", x(burn, millis(point.at)), y(burn, of(at))))
            .collect();
        points.join(" ")
    };
    let remaining = line(&|at| burn.points[at].remaining);
    let mut parts = vec![
        element(
            "path",
            &[
                ("class", "plot-grid"),
                ("d", "M0 0h1000M0 500h1000M0 1000h1000"),
            ],
            &[],
        ),
        element("path", &[("class", "ideal"), ("d", "M0 0L1000 1000")], &[]),
        element(
            "polyline",
            &[("class", "remaining"), ("points", &remaining)],
            &[],
        ),
    ];
    if let Some(last) = burn.points.last() {
        let (from_x, from_y) = (x(burn, millis(last.at)), y(burn, last.remaining));
        let (to_x, to_y) = match burn.used_up_at {
            Some(at) if millis(at) < millis(burn.resets_at) => (x(burn, millis(at)), 1000),
            _ => (1000, y(burn, burn.projected_remaining)),
        };
        let path = format!("M{from_x} {from_y}L{to_x} {to_y}");
        parts.push(element(
            "path",
            &[("class", "projection"), ("d", &path)],
            &[],
        ));
    }
    parts.push(element(
        "path",
        &[("class", "reset"), ("d", "M1000 0v1000")],
        &[],
    ));
    element(
        "svg",
        &[
            ("viewBox", "0 -20 1004 1040"),
            ("preserveAspectRatio", "none"),
            ("aria-hidden", "true"),
        ],
        &parts,
    )
}

/// Describes when the quota will be used up, or how much of it will be left at the reset. `clock` formats a time.
pub fn projection(burn: &BurnDown, now: i64, clock: &dyn Fn(i64) -> String) -> String {
    let reset = millis(burn.resets_at);
    let resets = format!("Resets {}.", clock(reset));
    match burn.used_up_at.map(millis) {
        _ if burn.remaining == 0 => format!("Used up. {resets}"),
        Some(at) if at > now && at < reset => {
            let early = countdown((reset - at).unsigned_abs() / 1000);
            format!(
                "At this pace, the quota will be used up on {}, {early} before it resets. {resets}",
                clock(at)
            )
        }
        _ => format!(
            "At this pace, {} will be left when the quota resets on {}.",
            number(burn.projected_remaining),
            clock(reset)
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Returns a burn-down for a day of 24 hours that is half over.
    fn burn(used: u64, used_up_at: Option<&str>, projected: u64) -> BurnDown {
        serde_json::from_value(json!({
            "key_id": "019ab4e1-7c00-7000-8000-0000000000b1", "policy": "daily", "limit": 1000, "used": used,
            "remaining": 1000 - used, "starts_at": "2026-11-26T00:00:00Z", "resets_at": "2026-11-27T00:00:00Z",
            "points": [
                {"at": "2026-11-26T00:00:00Z", "remaining": 1000, "ideal_remaining": 1000},
                {"at": "2026-11-26T12:00:00Z", "remaining": 1000 - used, "ideal_remaining": 500},
            ],
            "pace_per_hour": 12.5, "used_up_at": used_up_at, "projected_remaining": projected,
            "complete_until": "2026-11-26T12:00:00Z",
        }))
        .expect("a burn-down")
    }

    const NOON: i64 = 1_795_694_400_000;

    fn clock(at: i64) -> String {
        format!("{} h", (at - NOON) / 3_600_000)
    }

    #[test]
    fn line_falls_with_usage_and_the_projection_goes_on() {
        let svg = burn_down_chart(&burn(800, Some("2026-11-26T15:00:00Z"), 0)).to_string();
        assert!(svg.contains("points=\"0,0 500,800\""), "{svg}");
        assert!(svg.contains("d=\"M500 800L625 1000\""), "{svg}");
        let svg = burn_down_chart(&burn(200, None, 600)).to_string();
        assert!(svg.contains("d=\"M500 200L1000 400\""), "{svg}");
    }

    #[test]
    fn text_says_when_the_quota_is_used_up() {
        let text = |burn: &BurnDown| projection(burn, NOON, &clock);
        assert_eq!(
            text(&burn(800, Some("2026-11-26T15:00:00Z"), 0)),
            "At this pace, the quota will be used up on 3 h, 9 h 0 min before it resets. Resets 12 h."
        );
        assert_eq!(
            text(&burn(200, None, 600)),
            "At this pace, 600 will be left when the quota resets on 12 h."
        );
        assert_eq!(
            text(&burn(1000, Some("2026-11-26T11:00:00Z"), 0)),
            "Used up. Resets 12 h."
        );
    }
}
