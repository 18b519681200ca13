//! Access tokens: JWTs signed with Ed25519, valid for 15 minutes.
//!
//! The `kid` header selects the Ed25519 key. The `alg` header must be `EdDSA`, but it does not determine the algorithm
//! used for verification. A valid token is not sufficient: its session must also be active.

use std::collections::HashMap;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode,
};
use quota_common::{SessionId, TenantId, UserId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    AuthError,
    secret::{SecretPair, Secrets},
};
use crate::clock::UnixNanos;

/// The lifetime of an access token, in seconds.
pub const LIFETIME: u32 = 15 * 60;
const ISSUER: &str = "quota";
const AUDIENCE: &str = "quota-api";
const TYPE: &str = "at+jwt";
const LENGTH_MAX: usize = 4096;
/// The tolerated difference between the clocks of replicas, in seconds.
const LEEWAY: u64 = 30;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    iss: String,
    aud: String,
    pub sub: UserId,
    pub tid: TenantId,
    pub sid: SessionId,
    jti: Uuid,
    iat: u64,
    nbf: u64,
    exp: u64,
}

pub struct Signer {
    kid: String,
    key: EncodingKey,
    known: HashMap<String, DecodingKey>,
    validation: Validation,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer")
            .field("kid", &self.kid)
            .finish_non_exhaustive()
    }
}

struct Pair {
    kid: String,
    private: EncodingKey,
    public: DecodingKey,
}

fn pair(secrets: &Secrets) -> Result<Pair, AuthError> {
    let pair = Ed25519KeyPair::from_seed_unchecked(&secrets.signing_seed)
        .map_err(|error| AuthError::Internal(format!("cannot create the signing key: {error}")))?;
    let pkcs8 = pair
        .to_pkcs8v1()
        .map_err(|error| AuthError::Internal(format!("cannot create the signing key: {error}")))?;
    let public = pair.public_key().as_ref();
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, public);
    Ok(Pair {
        kid: URL_SAFE_NO_PAD.encode(&digest.as_ref()[..9]),
        private: EncodingKey::from_ed_der(pkcs8.as_ref()),
        public: DecodingKey::from_ed_der(public),
    })
}

impl Signer {
    /// Creates a signer for the current key. The signer also accepts tokens signed with the previous key.
    pub fn new(secrets: &SecretPair) -> Result<Self, AuthError> {
        let current = pair(&secrets.current)?;
        let mut known = HashMap::from([(current.kid.clone(), current.public)]);
        if let Some(previous) = &secrets.previous {
            let previous = pair(previous)?;
            known.insert(previous.kid, previous.public);
        }
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_audience(&[AUDIENCE]);
        validation.set_issuer(&[ISSUER]);
        validation.set_required_spec_claims(&["exp", "nbf", "aud", "iss", "sub"]);
        // [`Signer::verify`] checks these times itself, against the time that the caller passes.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        Ok(Self {
            kid: current.kid,
            key: current.private,
            known,
            validation,
        })
    }

    pub fn sign(
        &self,
        user: UserId,
        tenant: TenantId,
        session: SessionId,
        now: UnixNanos,
    ) -> Result<String, AuthError> {
        let claims = Claims {
            iss: ISSUER.into(),
            aud: AUDIENCE.into(),
            sub: user,
            tid: tenant,
            sid: session,
            jti: Uuid::now_v7(),
            iat: now.secs(),
            nbf: now.secs(),
            exp: now.secs() + u64::from(LIFETIME),
        };
        let header = Header {
            kid: Some(self.kid.clone()),
            typ: Some(TYPE.into()),
            ..Header::new(Algorithm::EdDSA)
        };
        encode(&header, &claims, &self.key)
            .map_err(|error| AuthError::Internal(format!("cannot sign: {error}")))
    }

    pub fn verify(&self, token: &str, now: UnixNanos) -> Result<Claims, AuthError> {
        if token.len() > LENGTH_MAX {
            return Err(AuthError::Unauthorized);
        }
        let header = decode_header(token).map_err(|_| AuthError::Unauthorized)?;
        if header.typ.as_deref() != Some(TYPE) {
            return Err(AuthError::Unauthorized);
        }
        let key = header
            .kid
            .as_deref()
            .and_then(|kid| self.known.get(kid))
            .ok_or(AuthError::Unauthorized)?;
        let claims = decode::<Claims>(token, key, &self.validation)
            .map_err(|_| AuthError::Unauthorized)?
            .claims;
        let now = now.secs();
        if claims.exp <= now || claims.nbf > now + LEEWAY {
            return Err(AuthError::Unauthorized);
        }
        Ok(claims)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const NOW: UnixNanos = UnixNanos::from_secs(1_785_738_360);

    fn secrets(n: u8) -> Secrets {
        Secrets::new(&[n; 32])
    }

    fn signer(current: u8, previous: Option<u8>) -> Signer {
        let previous = previous.map(|n| [n; 32]);
        let previous = previous.as_ref().map(<[u8; 32]>::as_slice);
        Signer::new(&SecretPair::new(&[current; 32], previous)).unwrap()
    }

    fn ids() -> (UserId, TenantId, SessionId) {
        let id = Uuid::from_u128;
        (UserId(id(1)), TenantId(id(2)), SessionId(id(3)))
    }

    fn later(secs: u64) -> UnixNanos {
        UnixNanos::from_secs(NOW.secs() + secs)
    }

    #[test]
    fn token_is_valid_for_fifteen_minutes() {
        let signer = signer(1, None);
        let (user, tenant, session) = ids();
        let token = signer.sign(user, tenant, session, NOW).unwrap();
        for secs in [0, 899] {
            let claims = signer.verify(&token, later(secs)).unwrap();
            assert_eq!(
                (claims.sub, claims.tid, claims.sid),
                (user, tenant, session)
            );
        }
        assert!(signer.verify(&token, later(900)).is_err());
        assert!(
            signer
                .verify(&token, UnixNanos::from_secs(NOW.secs() - 31))
                .is_err()
        );
    }

    #[test]
    fn token_of_the_previous_key_is_accepted() {
        let (user, tenant, session) = ids();
        let token = signer(1, None).sign(user, tenant, session, NOW).unwrap();
        assert!(signer(2, Some(1)).verify(&token, NOW).is_ok());
        assert!(signer(2, None).verify(&token, NOW).is_err());
    }

    fn part(value: &Value) -> String {
        URL_SAFE_NO_PAD.encode(value.to_string())
    }

    /// Signs arbitrary content with the real key.
    fn forge(header: &Value, claims: &str) -> String {
        let message = format!("{}.{}", part(header), URL_SAFE_NO_PAD.encode(claims));
        let pair = Ed25519KeyPair::from_seed_unchecked(&secrets(1).signing_seed).unwrap();
        let signature = URL_SAFE_NO_PAD.encode(pair.sign(message.as_bytes()));
        format!("{message}.{signature}")
    }

    #[test]
    fn forged_tokens_are_rejected() {
        let signer = signer(1, None);
        let (user, tenant, session) = ids();
        let good_header = json!({"typ": TYPE, "alg": "EdDSA", "kid": signer.kid});
        let good = json!({
            "iss": ISSUER, "aud": AUDIENCE, "sub": user, "tid": tenant, "sid": session, "jti": Uuid::nil(),
            "iat": NOW.secs(), "nbf": NOW.secs(), "exp": NOW.secs() + 60,
        });
        assert!(
            signer
                .verify(&forge(&good_header, &good.to_string()), NOW)
                .is_ok(),
            "an unchanged token is accepted"
        );

        let with = |field: &str, value: Value| {
            let mut claims = good.clone();
            claims[field] = value;
            claims.to_string()
        };
        let without = |field: &str| {
            let mut claims = good.clone();
            claims.as_object_mut().unwrap().remove(field);
            claims.to_string()
        };
        let mut claims = vec![
            with("iss", json!("evil")),
            with("iss", json!(["quota", "evil"])),
            with("aud", json!("other")),
            with("aud", json!([])),
            with("sub", json!("' OR 1=1 --")),
            with("sub", json!(null)),
            with("exp", json!(NOW.secs())),
            with("exp", json!(-1)),
            with("exp", json!("9999999999")),
            with("exp", json!(1e30)),
            with("nbf", json!(NOW.secs() + 31)),
            with("role", json!("owner")),
            good.to_string().replacen('{', "{\"exp\":99999999999,", 1),
            "[]".into(),
            "null".into(),
            String::new(),
        ];
        claims.extend(
            [
                "iss", "aud", "sub", "tid", "sid", "jti", "iat", "nbf", "exp",
            ]
            .map(without),
        );
        for claims in claims {
            let token = forge(&good_header, &claims);
            assert!(signer.verify(&token, NOW).is_err(), "claims {claims}");
        }

        let good = good.to_string();
        let headers = [
            json!({"typ": TYPE, "alg": "none", "kid": signer.kid}),
            json!({"typ": TYPE, "alg": "None", "kid": signer.kid}),
            json!({"typ": TYPE, "alg": "HS256", "kid": signer.kid}),
            json!({"typ": TYPE, "alg": "RS256", "kid": signer.kid}),
            json!({"typ": TYPE, "alg": "ES256", "kid": signer.kid}),
            json!({"typ": TYPE, "alg": "EdDSA"}),
            json!({"typ": TYPE, "alg": "EdDSA", "kid": "../../etc/passwd"}),
            json!({"typ": TYPE, "alg": "EdDSA", "kid": "' OR '1'='1"}),
            json!({"typ": TYPE, "alg": "EdDSA", "kid": 7}),
            json!({"typ": TYPE, "alg": "EdDSA", "kid": "x", "jku": "https://evil.example/keys"}),
            json!({"typ": "JWT", "alg": "EdDSA", "kid": signer.kid}),
            json!({"alg": "EdDSA", "kid": signer.kid}),
            json!({}),
        ];
        for header in headers {
            assert!(
                signer.verify(&forge(&header, &good), NOW).is_err(),
                "header {header}"
            );
        }

        // HS256 with the public key as its secret: a classic algorithm confusion attack.
        let pair = Ed25519KeyPair::from_seed_unchecked(&secrets(1).signing_seed).unwrap();
        let header = Header {
            kid: Some(signer.kid.clone()),
            typ: Some(TYPE.into()),
            ..Header::new(Algorithm::HS256)
        };
        let claims: Value = serde_json::from_str(&good).unwrap();
        let confused = encode(
            &header,
            &claims,
            &EncodingKey::from_secret(pair.public_key().as_ref()),
        )
        .unwrap();
        assert!(signer.verify(&confused, NOW).is_err());

        let token = forge(&good_header, &good);
        let (message, signature) = token.rsplit_once('.').unwrap();
        for crafted in [
            format!("{message}."),
            message.to_owned(),
            format!("{token}x"),
            format!("{token}.x"),
            format!(" {token}"),
            format!("{message}.{}", signature.to_ascii_uppercase()),
            format!("{message}.{signature}{}", "A".repeat(LENGTH_MAX)),
            String::new(),
            "..".into(),
        ] {
            assert!(signer.verify(&crafted, NOW).is_err(), "{crafted}");
        }
    }
}
